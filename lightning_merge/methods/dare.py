"""DARE: drop entries of the task vectors at random, rescale the rest, then merge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from lightning_merge.functional.dare import Rescale, bernoulli, drop_and_rescale, random_words
from lightning_merge.functional.task_arithmetic import add_update, task_vectors_of
from lightning_merge.functional.ties import BLOCK, SumOrTies, combined
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.checks import check_density, check_scale
from lightning_merge.states import StateDict


@final
@dataclass(frozen=True, kw_only=True)
class DARE(WeightMethod):
    """Drops entries of the task vectors at random, rescales the rest, and sums or elects signs."""

    density: float = 0.1
    """Probability that an entry is kept, in (0, 1]; the paper's drop rate is 1 - density."""

    scale: float = 0.3
    """Coefficient λ of the combined task vector; 1.0 is usual with ``combine: ties``."""

    combine: SumOrTies = "sum"
    """Sum the task vectors, or elect signs and average what has them, as TIES does."""

    rescale: Rescale = "inverse"
    """Divide by the density (the paper), restore the L1 or L2 norm, or leave what is kept."""

    seed: int = 0
    """Seed of the masks; they depend on it, the task and the parameter's name, nothing else."""

    def __post_init__(self) -> None:
        check_density(self.density)
        check_scale(self.scale)

    def bind(self, base: StateDict, experts: Mapping[str, StateDict]) -> WeightMethod:
        """Remember the tasks, on which the masks depend."""
        tasks = tuple(experts)
        if self.rescale in ("l1", "l2"):  # norms of whole parameters
            return self.bound_to(partial(self._merge_tensor, tasks))
        return self.bound_to_blocks(lambda name: partial(self._merge_block, tasks))

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter of experts that are called "0", "1", and so on."""
        return self._merge_tensor([str(t) for t in range(len(experts))], name, base, experts)

    def _merge_tensor(
        self, tasks: Sequence[str], name: str, base: Tensor, experts: Tensor
    ) -> Tensor:
        masks = self._masks(tasks, name, 0, base.reshape(-1))
        return self._merge(base, experts, [mask.view(base.shape) for mask in masks])

    def _merge_block(
        self, tasks: Sequence[str], name: str, start: int, base: Tensor, rows: Sequence[Tensor]
    ) -> Tensor:
        masks = self._masks(tasks, name, start, base)
        merged = torch.empty_like(base)
        for first in range(0, len(base), BLOCK):
            part = slice(first, first + BLOCK)
            experts = torch.stack([row[part] for row in rows])
            merged[part] = self._merge(base[part], experts, [mask[part] for mask in masks])
        return merged

    def _masks(self, tasks: Sequence[str], name: str, start: int, like: Tensor) -> list[Tensor]:
        words = (random_words(self.seed, task, name, len(like), start) for task in tasks)
        return [bernoulli(float(self.density), drawn).to(like.device) for drawn in words]

    def _merge(self, base: Tensor, experts: Tensor, masks: Sequence[Tensor]) -> Tensor:
        task_vectors = task_vectors_of(base, experts)
        for row, kept in zip(task_vectors, masks, strict=True):
            row.copy_(drop_and_rescale(row, kept, self.density, self.rescale))
        return add_update(base, combined(task_vectors, self.combine), self.scale)
