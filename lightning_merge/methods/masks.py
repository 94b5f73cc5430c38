"""What DARE and DELLA share: entries dropped at random, by probabilities that each has its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_merge.functional.dare import Rescale, bernoulli, drop_and_rescale, random_words
from lightning_merge.functional.task_arithmetic import add_update, task_vectors_of
from lightning_merge.functional.ties import BLOCK, SumOrTies, combined
from lightning_merge.methods.walk import BlockMerge

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

    def for_blocks(self, tasks: Mapping[str, object]) -> BlockMerge:
        """The same block by block, where all entries have one probability and no norm is kept."""
        return partial(self._merge_block, tuple(tasks))

    def _merge_block(
        self, tasks: Sequence[str], name: str, start: int, base: Tensor, rows: Sequence[Tensor]
    ) -> Tensor:
        keep = self.keep(base)
        assert isinstance(keep, float)
        drawn = (random_words(self.seed, task, name, len(base), start) for task in tasks)
        masks = [bernoulli(keep, words).to(base.device) for words in drawn]
        merged = torch.empty_like(base)
        for first in range(0, len(base), BLOCK):
            part = slice(first, first + BLOCK)
            task_vectors = task_vectors_of(base[part], torch.stack([row[part] for row in rows]))
            for row, mask in zip(task_vectors, masks, strict=True):
                row.copy_(drop_and_rescale(row, mask[part], keep, self.rescale))
            update = combined(task_vectors, self.combine)
            merged[part] = add_update(base[part], update, self.scale)
        return merged

    def merge(self, tasks: Sequence[str], name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one parameter: experts ``(T, *base.shape)`` of these tasks."""
        task_vectors = task_vectors_of(base, experts)
        for task, row in zip(tasks, task_vectors, strict=True):
            words = random_words(self.seed, task, name, row.numel()).to(row.device)
            keep = self.keep(row)
            kept = bernoulli(keep.flatten() if isinstance(keep, Tensor) else keep, words)
            row.copy_(drop_and_rescale(row, kept.view(row.shape), keep, self.rescale))
        return add_update(base, combined(task_vectors, self.combine), self.scale)


def numbered(experts: Tensor) -> list[str]:
    """Names of experts that have none: ``"0"``, ``"1"``, and so on."""
    return [str(index) for index in range(len(experts))]
