"""One forward pass for the samples of all tasks, each behind its own head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge.methods.calibrated import Calibration
from lightning_merge.networks import (
    call_network,
    get_submodule,
    logits_of,
    plain_copy,
    set_submodule,
)

TOLERANCE = 1e-2
"""Largest difference of joint from separate logits, relative to the largest logit."""


@dataclass(frozen=True, eq=False)
class Part:
    """Some samples of one task that go through the network together."""

    task: str
    inputs: Any
    rows: slice
    """Which of the task's samples of this step they are."""

    @property
    def size(self) -> int:
        """How many."""
        return self.rows.stop - self.rows.start


def size_of(batch: Any) -> int:
    """Samples of a batch: a tensor, or named tensors."""
    return len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch)


class _Reached(Exception):  # noqa: N818 (not an error: what follows the head is not needed)
    """The forward pass came to the head."""


class _SplitHead(nn.Module):
    """Several heads in the place of one, each for its own rows."""

    def __init__(self, heads: Sequence[nn.Module], sizes: Sequence[int]) -> None:
        super().__init__()
        self.heads, self.sizes = nn.ModuleList(heads), list(sizes)
        self.answers: list[Any] = []

    def forward(self, features: Tensor) -> Tensor:
        parts = features.split(self.sizes)
        self.answers = [head(part) for head, part in zip(self.heads, parts, strict=True)]
        raise _Reached


class SharedNetwork:
    """A network whose backbone changes, and the experts' heads, which don't.

    Samples of several tasks go through the backbone together, and what enters the head is split
    over the tasks' heads. That is only right if the network's answer is that of its head and
    samples don't mix: it is tried on a few samples, and otherwise each task has passes of its own.

    Args:
        calibration: Networks of all tasks.
        tasks: In order.
    """

    def __init__(self, calibration: Calibration, tasks: Sequence[str]) -> None:
        self.path = calibration.head
        self.precision = calibration.runtime.precision
        networks = (plain_copy(calibration.network(task)).eval() for task in tasks)
        self.network: nn.Module
        self.heads: dict[str, nn.Module] = {}
        for task, network in zip(tasks, networks, strict=True):
            if not self.heads:
                self.network = network.requires_grad_(False)
            self.heads[task] = get_submodule(network, self.path).requires_grad_(False)
        self.joint = True

    def try_joint(self, batches: Mapping[str, Any]) -> list[int]:
        """Find out whether tasks may share a forward pass, from a few samples of each.

        Returns:
            The number of classes of every task.

        Raises:
            ValueError: If a head does not give scores of at least two classes.
        """
        parts = [Part(task, _first(batch, 2), slice(0, 2)) for task, batch in batches.items()]
        with torch.no_grad():
            alone = [self._alone(part) for part in parts]
            for part, logits in zip(parts, alone, strict=True):
                if logits.shape[1] < 2:
                    raise ValueError(
                        f"the head of '{part.task}' has {logits.shape[1]} class: predictions of "
                        "one class are always certain. Leave the task out, or give it a head with "
                        "at least two."
                    )
            for group in self.grouped(parts, None):
                expected = [alone[parts.index(part)] for part in group]
                self.joint = self.joint and self._agrees(group, expected)
        return [logits.shape[1] for logits in alone]

    def grouped(self, parts: Sequence[Part], limit: int | None) -> list[list[Part]]:
        """Parts that share a forward pass: inputs of one size, at most ``limit`` samples."""
        kinds: dict[Any, list[Part]] = {}
        for index, part in enumerate(parts):
            kinds.setdefault(_kind(part.inputs) if self.joint else index, []).append(part)
        return [group for same in kinds.values() for group in _filled(same, limit)]

    def logits(self, parts: Sequence[Part]) -> list[Tensor]:
        """Class scores of every part, ``(n, classes)``, of one forward pass of the backbone."""
        if not self.joint:
            return [self._alone(part) for part in parts]
        split = _SplitHead([self.heads[p.task] for p in parts], [p.size for p in parts])
        set_submodule(self.network, self.path, split)
        try:
            with self.precision():
                call_network(self.network, _joined([part.inputs for part in parts]))
        except _Reached:
            return [logits_of(answer) for answer in split.answers]
        finally:
            self.set_head(parts[0].task)
        raise ValueError(
            f"the forward pass of {type(self.network).__name__} never reaches its head "
            f"'{self.path}'. Give the path of the head that the forward pass uses."
        )

    def set_head(self, task: str) -> None:
        """Put a task's head in its place."""
        set_submodule(self.network, self.path, self.heads[task])

    def _alone(self, part: Part) -> Tensor:
        self.set_head(part.task)
        with self.precision():
            return logits_of(call_network(self.network, part.inputs))

    def _agrees(self, group: Sequence[Part], expected: Sequence[Tensor]) -> bool:
        try:
            found = self.logits(group)
        except (RuntimeError, TypeError, ValueError):  # heads that don't take one tensor of rows
            return False
        return all(
            a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max() + 1e-6)
            for a, b in zip(found, expected, strict=True)
        )


def _filled(parts: Sequence[Part], limit: int | None) -> list[list[Part]]:
    if limit is None:
        return [list(parts)]
    groups: list[list[Part]] = [[]]
    room = limit
    for part in parts:
        start = 0
        while start < part.size:
            if room == 0:
                groups.append([])
                room = limit
            stop = min(part.size, start + room)
            first = part.rows.start
            rows = slice(first + start, first + stop)
            groups[-1].append(Part(part.task, _sliced(part.inputs, slice(start, stop)), rows))
            room -= stop - start
            start = stop
    return groups


def _kind(batch: Any) -> Any:
    named = batch if isinstance(batch, Mapping) else {"": batch}
    return tuple((name, value.shape[1:], value.dtype) for name, value in named.items())


def _sliced(batch: Any, rows: slice) -> Any:
    if isinstance(batch, Mapping):
        return {name: value[rows] for name, value in batch.items()}
    return batch[rows]


def _first(batch: Any, number: int) -> Any:
    """The first samples; of fewer, the last one again."""
    rows = torch.arange(number).clamp(max=size_of(batch) - 1)
    if isinstance(batch, Mapping):
        return {name: value[rows.to(value.device)] for name, value in batch.items()}
    return batch[rows.to(batch.device)]


def _joined(batches: Sequence[Any]) -> Any:
    if isinstance(batches[0], Mapping):
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return torch.cat(list(batches))
