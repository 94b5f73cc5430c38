"""Files that hold all experts in little space, and give any of them back."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from lightning_merge.files import write_tensors
from lightning_merge.states import LazyStateDict, StateDict


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

    @classmethod
    def write(
        cls, path: str | Path, tensors: Mapping[str, Tensor], experts: Mapping[str, StateDict]
    ) -> None:
        """Write a file of this format, in one step."""
        metadata = {"format": cls._format(), "tasks": json.dumps(list(experts))}
        write_tensors(path, tensors, metadata)

    @classmethod
    def _format(cls) -> str:
        return f"lightning-merge {cls.KIND} 1"

    def expert(self, task: str, base: StateDict) -> dict[str, Tensor]:
        """Rebuild one expert, with the keys, shapes and dtypes of the base it came from.

        Raises:
            ValueError: If the task is unknown, or the base is not the one of the file.
        """
        index = self.index(task)
        return {name: self._rebuild(index, name, base[name].detach()) for name in base}

    def index(self, task: str) -> int:
        """Number of a task in the file."""
        if task not in self.tasks:
            raise ValueError(f"no expert '{task}'; the file holds {', '.join(self.tasks)}.")
        return self.tasks.index(task)

    @abstractmethod
    def _rebuild(self, index: int, name: str, base: Tensor) -> Tensor:
        """One parameter of one expert."""
