"""Model Stock: between the base and the average, as far as the experts agree."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from lightning_merge.functional.della import rows_of
from lightning_merge.functional.model_stock import model_stock
from lightning_merge.methods.base import WeightMethod
from lightning_merge.states import StateDict


@final
@dataclass(frozen=True, kw_only=True)
class ModelStock(WeightMethod):
    """Moves from the base towards the average by what the angles between task vectors allow."""

    unit: Literal["tensor", "row"] = "tensor"
    """What has a ratio of its own: a parameter, or each row (output, filter) of a matrix."""

    pair_mean: Literal["cos", "angle"] = "cos"
    """Average the cosines of all pairs of experts, or their angles."""

    def bind(self, base: StateDict, experts: Mapping[str, StateDict]) -> WeightMethod:
        """Check that there are two experts or more."""
        if len(experts) < 2:
            raise ValueError(
                "Model Stock needs two experts or more, since its ratio comes from the angles "
                f"between them; found {', '.join(experts)} alone. Use TaskArithmetic."
            )
        return self

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter, as in ``WeightMethod.merge_tensor``."""
        rows = rows_of(base) if self.unit == "row" else base.reshape(1, -1)
        stacked = experts.reshape(len(experts), *rows.shape)
        return model_stock(rows, stacked, self.pair_mean).view(base.shape)
