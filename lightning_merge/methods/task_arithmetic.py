"""Task arithmetic: the base plus the scaled sum of the task vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_merge.functional.lora import sum_of_products
from lightning_merge.functional.task_arithmetic import add_update, task_arithmetic
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.checks import check_scale
from lightning_merge.methods.walk import LinearMerge


@final
@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(WeightMethod):
    """Adds the scaled sum of the experts' task vectors to the base."""

    scale: float = 0.3
    """Coefficient λ shared by all task vectors; dimensionless, in [0, 1] in the paper."""

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter, as in ``WeightMethod.merge_tensor``."""
        return task_arithmetic(base, experts, self._vector(len(experts)))

    def linear_merge(self, name: str) -> LinearMerge:
        """See ``WeightMethod.linear_merge``."""
        return LinearMerge(self._write, with_base=True)

    def merge_low_rank(
        self, name: str, base: Tensor, ups: Sequence[Tensor], downs: Sequence[Tensor]
    ) -> Tensor:
        """The factors side by side; see ``WeightMethod.merge_low_rank``."""
        update = sum_of_products(ups, downs, [1.0] * len(ups))
        return add_update(base, update.view(base.shape), self.scale)

    def _write(self, merged: Tensor, base: Tensor, experts: Sequence[Tensor]) -> None:
        fits = experts[0].dtype == merged.dtype and merged.dtype.itemsize >= 4
        coefficients = self._vector(len(experts))
        result = task_arithmetic(base, experts, coefficients, out=merged if fits else None)
        if not fits:
            merged.copy_(result)

    def _vector(self, num_experts: int) -> Tensor:
        return torch.full((num_experts,), self.scale, dtype=torch.float64)
