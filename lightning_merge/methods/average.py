"""Average of the experts' weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from lightning_merge.functional.average import average
from lightning_merge.functional.lora import sum_of_products
from lightning_merge.functional.task_arithmetic import add_update
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.checks import in_order
from lightning_merge.methods.walk import LinearMerge
from lightning_merge.states import StateDict


@final
@dataclass(frozen=True, kw_only=True)
class Average(WeightMethod):
    """Averages the experts; the base gives names, shapes and dtypes, and its values do not enter.

    So they are not read, and not checked. Entries in which all experts agree are kept bit for bit.
    """

    weights: dict[str, float] | None = None
    """Weight of each expert by task, divided by their sum; null: all alike."""

    def __post_init__(self) -> None:
        if self.weights is None:
            return
        bad = {task: weight for task, weight in self.weights.items() if not math.isfinite(weight)}
        total = sum(self.weights.values())
        if bad or abs(total) < 1e-8:
            raise ValueError(
                f"weights must be finite numbers with a sum that is not zero, found {self.weights}."
            )

    def bind(self, base: StateDict, experts: Mapping[str, StateDict]) -> "Average":
        """Check that the weights name the experts, and bring them into their order."""
        if self.weights is None:
            return self
        return replace(self, weights=in_order(self.weights, experts))

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter, as in ``WeightMethod.merge_tensor``."""
        return self.average_tensor(experts).to(base.dtype)

    def linear_merge(self, name: str) -> LinearMerge:
        """See ``WeightMethod.linear_merge``."""
        return self._write

    def merge_low_rank(
        self, name: str, base: Tensor, ups: Sequence[Tensor], downs: Sequence[Tensor]
    ) -> Tensor:
        """The factors side by side; see ``WeightMethod.merge_low_rank``."""
        weights = self._weights(len(ups))
        shares = [weight / math.fsum(weights) for weight in weights]
        update = sum_of_products(ups, downs, shares)
        return add_update(base, update.view(base.shape), 1.0)

    def _write(self, merged: Tensor, base: Tensor, experts: Sequence[Tensor]) -> None:
        fits = experts[0].dtype == merged.dtype and merged.dtype.itemsize >= 4
        result = average(experts, self._weights(len(experts)), out=merged if fits else None)
        if not fits:
            merged.copy_(result)

    def average_tensor(self, experts: Tensor) -> Tensor:
        """Weighted average of ``(T, *shape)``; running statistics get the same weights."""
        return average(experts, self._weights(len(experts)))

    def _weights(self, num_experts: int) -> tuple[float, ...]:
        return (1.0,) * num_experts if self.weights is None else tuple(self.weights.values())
