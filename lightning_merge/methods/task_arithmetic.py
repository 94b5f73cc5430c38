"""Task arithmetic: the base plus the scaled sum of the task vectors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from lightning_merge.functional.lora import sum_of_products
from lightning_merge.functional.task_arithmetic import add_update, task_arithmetic
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.checks import check_scale, in_order
from lightning_merge.methods.walk import LinearMerge
from lightning_merge.states import StateDict


@final
@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(WeightMethod):
    """Adds the scaled sum of the experts' task vectors to the base."""

    scale: float = 0.3
    """Coefficient λ shared by all task vectors; dimensionless, in [0, 1] in the paper."""

    weights: dict[str, float] | None = None
    """Weight of each expert by task, of any sign; null: one each."""

    normalize: bool = False
    """Divide by the sum of the weights: with scale 1 and without weights, the average."""

    def __post_init__(self) -> None:
        check_scale(self.scale)
        weights = self.weights or {}
        if not all(math.isfinite(weight) for weight in weights.values()):
            raise ValueError(f"weights must be finite numbers, found {weights}.")
        if weights and self.normalize and abs(sum(weights.values())) < 1e-8:
            raise ValueError(
                f"normalize divides by the sum of the weights, which is zero: {weights}. Change "
                "them, or leave normalize out."
            )

    def bind(self, base: StateDict, experts: Mapping[str, StateDict]) -> "TaskArithmetic":
        """Check that the weights name the experts, and bring them into their order."""
        if self.weights is None:
            return self
        return replace(self, weights=in_order(self.weights, experts))

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter, as in ``WeightMethod.merge_tensor``."""
        return task_arithmetic(base, experts, self._coefficients(len(experts)))

    def linear_merge(self, name: str) -> LinearMerge:
        """See ``WeightMethod.linear_merge``."""
        return self._write

    def merge_low_rank(
        self, name: str, base: Tensor, ups: Sequence[Tensor], downs: Sequence[Tensor]
    ) -> Tensor:
        """The factors side by side; see ``WeightMethod.merge_low_rank``."""
        update = sum_of_products(ups, downs, self._coefficients(len(ups)))
        return add_update(base, update.view(base.shape), 1.0)

    def _write(self, merged: Tensor, base: Tensor, experts: Sequence[Tensor]) -> None:
        fits = experts[0].dtype == merged.dtype and merged.dtype.itemsize >= 4
        coefficients = self._coefficients(len(experts))
        result = task_arithmetic(base, experts, coefficients, out=merged if fits else None)
        if not fits:
            merged.copy_(result)

    def _coefficients(self, num_experts: int) -> list[float]:
        weights = [1.0] * num_experts if self.weights is None else list(self.weights.values())
        total = math.fsum(weights) if self.normalize else 1.0
        return [self.scale * weight / total for weight in weights]
