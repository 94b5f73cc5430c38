"""Files that hold all experts in little space, and give any of them back."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.files import write_tensors
from lightning_merge.methods.rules import matches
from lightning_merge.states import (
    STATISTIC_SUFFIXES,
    LazyStateDict,
    StateDict,
    check_finite,
    kind_of,
    tied_names,
)


@dataclass(frozen=True, kw_only=True)
class ExpertStore(ABC):
    """A recipe that keeps all experts in one small file, instead of merging them."""

    @abstractmethod
    def save(
        self, path: str | Path, base: StateDict, experts: Mapping[str, StateDict]
    ) -> "StoredExperts":
        """Write the experts into one safetensors file and open it.

        Raises:
            ValueError: If the experts do not fit the base, or a value is not finite.
        """


class StoredExperts(ABC):
    """An open file of experts, any of them rebuilt on demand.

    Args:
        path: The file; a foreign or damaged one is a ``ValueError`` that names it.
    """

    KIND: ClassVar[str]
    """What the file holds, in its format and in messages."""
    WRITER: ClassVar[str]
    """Name of the class that writes such files."""

    def __init__(self, path: str | Path) -> None:
        self._file = LazyStateDict(path)
        if self._file.metadata.get("format") != self._format():
            raise ValueError(
                f"{path} holds no {self.KIND} of this format. Write it with {self.WRITER}."
            )
        self.tasks: tuple[str, ...] = tuple(json.loads(self._file.metadata["tasks"]))
        self._ties: dict[str, str] = json.loads(self._file.metadata.get("ties", "{}"))

    @classmethod
    def write(
        cls,
        path: str | Path,
        tensors: Mapping[str, Tensor],
        base: StateDict,
        experts: Mapping[str, StateDict],
    ) -> None:
        """Write a file of this format, in one step."""
        metadata = {
            "format": cls._format(),
            "tasks": json.dumps(list(experts)),
            "ties": json.dumps(tied_names(base)),
        }
        write_tensors(path, tensors, metadata)

    @classmethod
    def _format(cls) -> str:
        return f"lightning-merge {cls.KIND} 1"

    def expert(self, task: str, base: StateDict) -> dict[str, Tensor]:
        """Rebuild one expert, with the keys, shapes, dtypes and ties of the base it came from.

        Raises:
            ValueError: If the task is unknown, or the base is not the one of the file.
        """
        index = self.index(task)
        rebuilt: dict[str, Tensor] = {}
        for name in base:
            first = self._ties.get(name, name)
            if first not in rebuilt:  # a base without the earlier name has its value all the same
                rebuilt[first] = self._entry(index, first, base[name].detach())
            rebuilt[name] = rebuilt[first]
        return {name: rebuilt[name] for name in base}

    def error(self, task: str, base: StateDict, expert: StateDict) -> float:
        """Distance of a rebuilt expert from the expert, as a share of the base's distance from it.

        Over the floating-point entries; 0 where nothing was lost.
        """
        rebuilt = self.expert(task, base)
        names = [name for name in base if kind_of(base, name) == "floating"]
        lost, moved = (
            math.hypot(*(_distance(state[name], expert[name]) for name in names))
            for state in (rebuilt, base)
        )
        return lost / moved if lost else 0.0

    def index(self, task: str) -> int:
        """Number of a task in the file."""
        if task not in self.tasks:
            raise ValueError(f"no expert '{task}'; the file holds {', '.join(self.tasks)}.")
        return self.tasks.index(task)

    def _entry(self, index: int, name: str, base: Tensor) -> Tensor:
        key = whole_key(index, name)
        if key not in self._file:
            return self._rebuild(index, name, base)
        if self._file.shape(key) != base.shape:
            raise ValueError(
                f"{self._file.path}: '{name}' has shape {self._file.shape(key)}, the base's is "
                f"{tuple(base.shape)}. Rebuild with the base it was made from."
            )
        return self._file[key].clone().to(base.device, base.dtype)

    @abstractmethod
    def _rebuild(self, index: int, name: str, base: Tensor) -> Tensor:
        """One parameter of one expert that is not stored whole."""


def _distance(one: Tensor, other: Tensor) -> float:
    return float(torch.dist(one.detach().double(), other.detach().to(one.device).double()))


def whole_key(index: int, name: str) -> str:
    """Where a file has a parameter of one expert that is stored as it is."""
    return f"{index}/whole/{name}"


def whole_entries(
    name: str, base: StateDict, experts: Mapping[str, StateDict]
) -> dict[str, Tensor]:
    """A parameter of every expert to store as it is, in the base's dtype.

    Raises:
        ValueError: If a value is not finite.
    """
    dtype = base[name].dtype
    check_finite(name, "the base", base[name])
    for task, expert in experts.items():
        check_finite(name, f"expert '{task}'", expert[name])
    return {
        whole_key(index, name): expert[name].detach().to(dtype, copy=True)
        for index, expert in enumerate(experts.values())
    }


def is_statistic(name: str, base: StateDict, buffers: Sequence[str] = ()) -> bool:
    """Whether an entry is an integer or a buffer, which must come back as it was.

    Running means and variances are known by their names, other buffers by patterns.
    """
    statistic = name.rpartition(".")[2] in STATISTIC_SUFFIXES or matches(name, buffers)
    return statistic or kind_of(base, name) != "floating"
