"""What DARE and DELLA share: entries dropped at random, by probabilities that each has its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

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
from lightning_merge.functional.ties import Room, SumOrTies, block_consensus, combined, elect
from lightning_merge.methods.blocks import Thin, in_blocks
from lightning_merge.methods.walk import BlockMerge, map_blocks
from lightning_merge.states import StateDict

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

    def for_blocks(self, tasks: Sequence[str], majority: Callable[[], float]) -> BlockMerge:
        """The same block by block, where all entries have one probability and no norm is kept.

        Args:
            tasks: Names of the experts.
            majority: Gives the sign that most entries of the parameter elect, where that is asked.
        """
        return in_blocks(partial(self._begin, tasks), partial(self._combined, majority))

    def majority_sign(
        self,
        name: str,
        base: StateDict,
        experts: Mapping[str, StateDict],
        coefficients: Sequence[float],
    ) -> float:
        """Sign that most entries of one parameter elect: a pass of its own."""
        merge = in_blocks(partial(self._begin, tuple(experts)), _elected)
        signs = map_blocks(merge, name, base[name].detach(), experts, coefficients)
        return float(signs.sum(dtype=torch.float64).sign())

    def _begin(self, tasks: Sequence[str], name: str, start: int, size: int) -> Thin:
        keep = self.keep(torch.empty(0))
        assert isinstance(keep, float)
        words = [random_words(self.seed, task, name, size, start) for task in tasks]

        def thin(t: int, part: slice, vector: Tensor) -> None:
            drop(vector, bernoulli(keep, words[t][part]).to(vector.device))

        return thin

    def _combined(
        self, majority: Callable[[], float], base: Tensor, thinned: Tensor, room: Room
    ) -> Tensor:
        if self.combine == "ties":
            update = block_consensus(thinned, "mean", "majority", majority, room)
        else:
            update = thinned.sum(0)
        keep = self.keep(base)
        assert isinstance(keep, float)
        # an inverse probability common to all entries is as well applied to what is combined
        scale = self.scale / keep if self.rescale == "inverse" else self.scale
        return add_update(base, update, scale)

    def merge(self, tasks: Sequence[str], name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one parameter: experts ``(T, *base.shape)`` of these tasks."""
        task_vectors = task_vectors_of(base, experts)
        for task, row in zip(tasks, task_vectors, strict=True):
            words = random_words(self.seed, task, name, row.numel()).to(row.device)
            keep = self.keep(row)
            kept = bernoulli(keep.flatten() if isinstance(keep, Tensor) else keep, words)
            row.copy_(drop_and_rescale(row, kept.view(row.shape), keep, self.rescale))
        return add_update(base, combined(task_vectors, self.combine), self.scale)


def _elected(base: Tensor, thinned: Tensor, room: Room) -> Tensor:
    return elect(thinned)


def numbered(experts: Tensor) -> list[str]:
    """Names of experts that have none: ``"0"``, ``"1"``, and so on."""
    return [str(index) for index in range(len(experts))]
