"""Where the work of a stage runs: one process, or a share of several. Plain torch."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def _same(value: Tensor) -> Tensor:
    return value


class Progress(Protocol):
    """Shows a bar while it passes items on."""

    def __call__(
        self,
        items: Iterable[Any],
        total: int,
        description: str,
        note: Callable[[Any], str] | None = None,
    ) -> Iterable[Any]:
        """Pass the items on, of which there are ``total``; ``note`` says what an item is."""


def _silent(
    items: Iterable[Any],
    total: int,
    description: str,
    note: Callable[[Any], str] | None = None,
) -> Iterable[Any]:
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
    progress: Progress = _silent
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

    def over_parameters(self, names: Sequence[str], description: str) -> Iterable[str]:
        """Pass names of parameters on under a bar that shows the name and the memory in use."""

        def note(name: str) -> str:
            memory = f"{memory_in_use(self.device) / 2**30:.2f} GiB"
            return f"{name}, {memory}"

        return self.progress(names, len(names), description, note)

    def to_device(self, batch: Any) -> Any:
        """Move the tensors of a batch, nested in mappings and sequences, to the device."""
        if isinstance(batch, Tensor):
            return batch.to(self.device, non_blocking=True)
        if isinstance(batch, dict):
            return {name: self.to_device(value) for name, value in batch.items()}
        if isinstance(batch, (tuple, list)):
            return type(batch)(self.to_device(value) for value in batch)
        return batch


def memory_in_use(device: torch.device | None = None) -> int:
    """Bytes that this process holds now: private memory, without files that are mapped.

    On a CUDA device those of its tensors; where the system does not tell, the highest so far.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()
        return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return _highest()


class PeakMemory:
    """The most memory that this process, or its tensors on a CUDA device, held since a moment.

    Exact where it is more than the process ever held before: the system counts that, with the
    files that are mapped. Otherwise the most that was in use at any :meth:`note`.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device, self._seen = device, 0
        self._before = self._highest()
        self.note()

    def note(self) -> None:
        """Look at the memory in use."""
        self._seen = max(self._seen, memory_in_use(self._device))

    @property
    def bytes(self) -> int:
        """The most so far."""
        highest = self._highest()
        return highest if highest > self._before else self._seen

    def _highest(self) -> int:
        if self._device is not None and self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _highest()


def _highest() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
