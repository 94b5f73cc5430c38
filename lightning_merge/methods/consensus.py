"""Consensus: the entries of the summed task vectors that matter to several tasks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, final

import torch
from torch import Tensor

from lightning_merge.functional.tall import consensus
from lightning_merge.functional.task_arithmetic import add_update, task_vectors_of
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.checks import check_density, check_scale
from lightning_merge.methods.ties import TIES
from lightning_merge.states import StateDict


@final
@dataclass(frozen=True, kw_only=True)
class Consensus(WeightMethod):
    """Task arithmetic without the entries that matter to too few tasks (TALL masks)."""

    scale: float = 0.3
    """Coefficient λ of what is kept of the summed task vectors."""

    threshold: float = 0.4
    """κ of every task's mask, at least 0: larger is sparser; the paper tunes it in 0.2 to 0.6."""

    thresholds: dict[str, float] = field(default_factory=dict)
    """κ of single tasks, instead of ``threshold``."""

    vector: Literal["sum", "ties"] = "sum"
    """The multi-task vector that is masked: the sum of the task vectors, or what TIES makes of
    them, with which ``scale`` is usually 1."""

    density: float = 0.2
    """Fraction of the entries that TIES keeps of each task vector, with ``vector: ties``."""

    min_active: int = 2
    """How many tasks must need an entry: 0 is task arithmetic, more than there are is the base."""

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_density(self.density)
        for kappa in (self.threshold, *self.thresholds.values()):
            if not (kappa >= 0 and math.isfinite(kappa)):
                raise ValueError(f"thresholds must be finite and at least 0, found {kappa}.")
        if self.min_active < 0:
            raise ValueError(f"min_active must be at least 0, found {self.min_active}.")

    def bind(self, base: StateDict, experts: Mapping[str, StateDict]) -> WeightMethod:
        """Give every task a threshold, in the experts' order, and trim over the whole model."""
        unknown = [task for task in self.thresholds if task not in experts]
        if unknown:
            raise ValueError(
                f"thresholds name unknown tasks: {', '.join(unknown)}; "
                f"the experts are {', '.join(experts)}."
            )
        every = {task: self.thresholds.get(task, self.threshold) for task in experts}
        bound = replace(self, thresholds=every)
        if self.vector == "sum":
            return bound
        return self.bound_to(partial(bound._merge_with, self._ties().bind(base, experts)))

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter, as in ``WeightMethod.merge_tensor``."""
        return self._merge_with(self._ties(), name, base, experts)

    def _merge_with(self, ties: WeightMethod, name: str, base: Tensor, experts: Tensor) -> Tensor:
        vectors = task_vectors_of(base, experts)
        if self.vector == "sum":
            merged = vectors.sum(0)
        else:  # experts that are task vectors, on a base of zeros, give the vector itself
            merged = ties.merge_tensor(name, torch.zeros_like(vectors[0]), vectors)
        values = list(self.thresholds.values()) or [self.threshold] * len(experts)
        kept = consensus(vectors, merged, torch.tensor(values), self.min_active)
        return add_update(base, kept, self.scale)

    def _ties(self) -> TIES:
        return TIES(**self.common_options(), density=self.density)
