"""Unlabeled calibration inputs of a task: kept in a safetensors file, read a slice at a time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge.files import write_tensors
from lightning_merge.functional.spread import evenly_spread
from lightning_merge.states import LazyStateDict

SINGLE = "inputs"
"""Name of the tensor where a network takes one; networks with named inputs keep their names."""


class CalibrationInputs:
    """Inputs of one task, as one tensor or as named tensors with the samples in front.

    Args:
        tensors: ``{"inputs": tensor}`` for networks called with one tensor, else the keyword
            arguments of the network. A lazily read file is read a slice at a time.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        sizes = {name: _length(tensors, name) for name in tensors}
        if not sizes or min(sizes.values()) == 0:
            raise ValueError(
                "the calibration inputs are empty: the correction needs at least one unlabeled "
                "input a task, and more is better (a tenth of the training set does)."
            )
        if len(set(sizes.values())) != 1:
            raise ValueError(f"calibration inputs of different lengths: {sizes}.")
        self._size = next(iter(sizes.values()))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, rows: slice) -> Any:
        """Inputs of a slice of samples, in the form that the network is called with."""
        if isinstance(self._tensors, LazyStateDict):
            values = {name: self._tensors.rows(name, rows) for name in self._tensors}
        else:
            values = {name: tensor[rows] for name, tensor in self._tensors.items()}
        return values[SINGLE] if set(values) == {SINGLE} else values

    def take(self, rows: Tensor) -> Any:
        """Inputs of some samples, by index and in that order, in the form of ``inputs[slice]``."""
        values = {name: tensor[rows] for name, tensor in self._tensors.items()}
        return values[SINGLE] if set(values) == {SINGLE} else values

    def spread(self, number: int) -> "CalibrationInputs":
        """At most so many samples, evenly spread: sets sorted by class keep their classes.

        Raises:
            ValueError: If the number is not positive.
        """
        if number < 1:
            raise ValueError(f"num_samples={number}: expected at least 1, or null for all.")
        if number >= len(self):
            return self
        return CalibrationInputs(_named(self.take(evenly_spread(len(self), number))))

    def batches(self, batch_size: int) -> Iterator[slice]:
        """Slices of ``batch_size`` samples that cover all of them; the last may be shorter."""
        for start in range(0, self._size, batch_size):
            yield slice(start, min(start + batch_size, self._size))

    def tensors(self) -> dict[str, Tensor]:
        """All inputs by name, in memory."""
        return dict(self._tensors)

    def save(self, path: str | Path) -> None:
        """Write the inputs as safetensors, in one step."""
        write_tensors(path, self._tensors)

    @classmethod
    def load(cls, path: str | Path) -> "CalibrationInputs":
        """Open a file that :meth:`save` wrote; nothing is read yet."""
        return cls(LazyStateDict(path))

    @classmethod
    def collect(cls, source: Any, limit: int | None = None) -> "CalibrationInputs":
        """Gather inputs from a tensor, named tensors, or an iterable of such batches.

        Args:
            source: ``(n, ...)`` tensor; mapping of named tensors; or an iterable of batches of
                either kind, such as a DataLoader of unlabeled inputs.
            limit: Take at most this many samples, from the front.

        Raises:
            ValueError: If there are none, or a batch is of another kind.
        """
        if isinstance(source, cls):
            return cls(_named(source[slice(0, limit)]))
        if isinstance(source, Tensor) or _is_named(source):
            source = [source]
        if not isinstance(source, Iterable):
            raise ValueError(
                f"calibration inputs must be a tensor, a mapping of tensors, or batches of them; "
                f"found {type(source).__name__}."
            )
        parts: list[dict[str, Tensor]] = []
        found = 0
        for batch in source:
            part = {name: tensor.detach().cpu() for name, tensor in _named(batch).items()}
            parts.append(part)
            found += min((len(tensor) for tensor in part.values()), default=0)
            if limit is not None and found >= limit:
                break
        if not parts:
            return cls({})
        if any(set(part) != set(parts[0]) for part in parts):
            raise ValueError("calibration batches have different names of inputs.")
        joined = {name: torch.cat([part[name] for part in parts])[:limit] for name in parts[0]}
        return cls(joined)


def check_finite_batch(task: str, batch: Any, numbers: Sequence[int]) -> None:
    """Raise a ``ValueError`` naming the task if a batch of calibration inputs is not all finite.

    Args:
        task: Whose inputs.
        batch: A tensor of inputs, or named tensors.
        numbers: Of its samples among the task's inputs.
    """
    for name, value in _named(batch).items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            first = int((~value.isfinite()).flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"'{task}': calibration input '{name}' holds NaN or infinity, first in sample "
                f"{numbers[first]}. Clean the inputs."
            )


def _is_named(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(x, Tensor) for x in value.values())


def _named(batch: Any) -> dict[str, Tensor]:
    if isinstance(batch, Tensor):
        return {SINGLE: batch}
    if _is_named(batch):
        return dict(batch)
    raise ValueError(
        "a calibration batch must be a tensor of inputs or a mapping of named tensors, found "
        f"{type(batch).__name__}. Leave the labels out."
    )


def _length(tensors: Mapping[str, Tensor], name: str) -> int:
    shape = tensors.shape(name) if isinstance(tensors, LazyStateDict) else tensors[name].shape
    return int(shape[0]) if len(shape) else 0
