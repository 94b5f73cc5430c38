"""What DARE and DELLA share: entries dropped at random, by probabilities that each has its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from lightning_merge.functional.dare import (
    Rescale,
    bernoulli,
    drop,
    drop_and_rescale,
    random_words,
)
from lightning_merge.functional.task_arithmetic import add_update, task_vectors_of
from lightning_merge.functional.ties import (
    Room,
    SumOrTies,
    block_consensus,
    cancelled,
    combined,
    minus_side,
)
from lightning_merge.methods.blocks import Begin, Rooms, Thin, in_blocks
from lightning_merge.methods.walk import BlockMerge, SettledMerge

Keep: TypeAlias = Callable[[Tensor], Tensor | float]
"""Probability that an entry of a task vector is kept: one for each, or one for all."""


@dataclass(frozen=True, kw_only=True)
class RandomDrop:
    """Drops entries of the task vectors at random, rescales the rest, and combines them."""

    keep: Keep
    rescale: Rescale
    seed: int
    combine: SumOrTies
    scale: float

    def for_tasks(
        self, tasks: Sequence[str] | Mapping[str, object]
    ) -> Callable[[str, Tensor, Tensor], Tensor]:
        """What merges one parameter of these experts: the masks depend on their names."""
        return partial(self.merge, tuple(tasks))

    def for_blocks(self, tasks: Sequence[str], rooms: Rooms) -> BlockMerge:
        """The same block by block, where all entries have one probability and no norm is kept."""
        begin = partial(self._begin, tuple(tasks))
        if self.combine == "ties":
            return _ElectInBlocks(begin, self._block_scale, rooms)
        return in_blocks(begin, self._summed, rooms)

    def _begin(self, tasks: Sequence[str], name: str, start: int, size: int) -> Thin:
        keep = self.keep(torch.empty(0))
        assert isinstance(keep, float)
        words = [random_words(self.seed, task, name, size, start) for task in tasks]

        def thin(t: int, part: slice, vector: Tensor) -> None:
            drop(vector, bernoulli(keep, words[t][part]).to(vector.device))

        return thin

    @property
    def _block_scale(self) -> float:
        # an inverse probability common to all entries is as well applied to what is combined
        keep = self.keep(torch.empty(0))
        assert isinstance(keep, float)
        return self.scale / keep if self.rescale == "inverse" else self.scale

    def _summed(self, start: int, base: Tensor, thinned: Tensor, room: Room) -> Tensor:
        return add_update(base, thinned.sum(0), self._block_scale)

    def merge(self, tasks: Sequence[str], name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one parameter: experts ``(T, *base.shape)`` of these tasks."""
        task_vectors = task_vectors_of(base, experts)
        for task, row in zip(tasks, task_vectors, strict=True):
            words = random_words(self.seed, task, name, row.numel()).to(row.device)
            keep = self.keep(row)
            kept = bernoulli(keep.flatten() if isinstance(keep, Tensor) else keep, words)
            row.copy_(drop_and_rescale(row, kept.view(row.shape), keep, self.rescale))
        return add_update(base, combined(task_vectors, self.combine), self.scale)


@final
class _ElectInBlocks(SettledMerge):
    """Elects signs and averages what has them, for one parameter.

    Where task vectors cancel, the sign is that of most entries of the parameter, which is known
    after the last block: until then it is plus, and what minus would give is kept.
    """

    def __init__(self, begin: Begin, scale: float, rooms: Rooms) -> None:
        self._merge, self._scale = in_blocks(begin, self._elected, rooms), scale
        self._signs, self._open, self._lock = 0.0, list[tuple[Tensor, Tensor, Tensor]](), Lock()

    def __call__(self, name: str, start: int, base: Tensor, rows: Sequence[Tensor]) -> Tensor:
        return self._merge(name, start, base, rows)

    def settle(self, merged: Tensor) -> None:
        sign = float(np.sign(self._signs))
        for places, base, minus in self._open if sign <= 0 else ():
            merged[places] = add_update(base, sign * minus, self._scale)

    def _elected(self, start: int, base: Tensor, thinned: Tensor, room: Room) -> Tensor:
        update = block_consensus(thinned, "mean", "positive", lambda: 1.0, room)
        signs = room.narrow(len(base))[0].sign_()  # of the sums, which the election leaves there
        total, columns = float(signs.sum()), cancelled(signs, update)
        with self._lock:
            self._signs += total
            if len(columns):
                minus = minus_side(thinned[:, columns], "mean")
                self._open.append((start + columns, base[columns], minus))
        return add_update(base, update, self._scale)


def numbered(experts: Tensor) -> list[str]:
    """Names of experts that have none: ``"0"``, ``"1"``, and so on."""
    return [str(index) for index in range(len(experts))]
