"""Where the work of a stage runs: one process, or a share of several. Plain torch."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def _same(value: Tensor) -> Tensor:
    return value


def _silent(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
    return items


def _nothing(name: str) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One process's place among those that share a stage, and how they speak.

    The default is a single process on the CPU. The Trainer makes one from its strategy, so that
    any strategy serves and no launcher of our own is needed.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world_size: int = 1
    reduce: Callable[[Tensor], Tensor] = _same
    """Sum of a tensor over all processes; every process calls it with the same shape."""
    barrier: Callable[[str], None] = _nothing
    progress: Callable[[Iterable[Any], int, str], Iterable[Any]] = _silent
    """Shows a bar with a total and a description while it passes the items on."""
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Context of forward passes, such as autocast."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, items: Iterable[Item]) -> Iterator[Item]:
        """This process's share: every ``world_size``-th item, none repeated, none padded."""
        return (item for index, item in enumerate(items) if index % self.world_size == self.rank)

    def to_device(self, batch: Any) -> Any:
        """Move the tensors of a batch, nested in mappings and sequences, to the device."""
        if isinstance(batch, Tensor):
            return batch.to(self.device, non_blocking=True)
        if isinstance(batch, dict):
            return {name: self.to_device(value) for name, value in batch.items()}
        if isinstance(batch, (tuple, list)):
            return type(batch)(self.to_device(value) for value in batch)
        return batch
