"""What DARE and DELLA share: entries dropped at random, by probabilities that each has its own."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_merge.functional.dare import (
    Rescale,
    bernoulli,
    bit_mask,
    drop_and_rescale,
    keep_bits,
    random_words,
)
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
        wide = torch.promote_types(torch.promote_types(base.dtype, rows[0].dtype), torch.float32)
        masks = [
            bit_mask(keep, random_words(self.seed, task, name, len(base), start)).to(base.device)
            for task in tasks
        ]
        merged, origin = torch.empty_like(base), base.to(wide)
        # an inverse probability common to all entries is as well applied to what is combined
        scale = self.scale / keep if self.rescale == "inverse" else self.scale
        stack = base.new_empty((len(rows), min(BLOCK, len(base))), dtype=wide)
        # split once: a slice costs as much as an operation on a small block
        wholes = (merged, origin, *(row.to(wide) for row in rows), *masks)
        for out, here, *parts in zip(*(whole.split(BLOCK) for whole in wholes), strict=True):
            stack = stack if stack.shape[1] == len(here) else stack[:, : len(here)].contiguous()
            for row, part in zip(stack, parts, strict=False):
                torch.sub(part, here, out=row)
            if not math.isfinite(float(stack.sum())) and not bool(stack.isfinite().all()):
                out.fill_(math.nan)  # a mask drops NaN and infinity too: the walk must see them
                continue
            for row, mask in zip(stack, parts[len(rows) :], strict=True):
                keep_bits(row, mask)
            out.copy_(add_update(here, combined(stack, self.combine), scale))
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
