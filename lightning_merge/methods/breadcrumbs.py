"""Breadcrumbs: drop the outliers and the noise of the task vectors, then merge."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_merge.functional.breadcrumbs import breadcrumbs
from lightning_merge.functional.task_arithmetic import add_update, task_vectors_of
from lightning_merge.functional.ties import SumOrTies, combined
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.checks import check_density, check_scale


@final
@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(WeightMethod):
    """Drops the largest and the many small entries of each task vector, and sums the rest."""

    density: float = 0.15
    """Fraction of the entries of a parameter to keep, in (0, 1]."""

    drop_top: float = 0.01
    """Fraction of the largest entries to drop, in [0, 1)."""

    scale: float = 0.3
    """Coefficient λ of the combined task vector; 1.0 is usual with ``combine: ties``."""

    combine: SumOrTies = "sum"
    """Sum the task vectors, or elect signs and average what has them, as TIES does."""

    def __post_init__(self) -> None:
        check_density(self.density)
        check_scale(self.scale)
        if not 0 <= self.drop_top < 1:
            raise ValueError(f"drop_top must lie in [0, 1), found {self.drop_top}.")

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter, as in ``WeightMethod.merge_tensor``."""
        rows = task_vectors_of(base, experts)
        masked = torch.stack([breadcrumbs(row, self.density, self.drop_top) for row in rows])
        return add_update(base, combined(masked, self.combine), self.scale)
