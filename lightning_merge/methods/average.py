"""Average of the experts' weights."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_merge.functional.average import average
from lightning_merge.methods.base import WeightMethod


@final
@dataclass(frozen=True, kw_only=True)
class Average(WeightMethod):
    """Averages the experts; the base does not enter."""

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter, as in ``WeightMethod.merge_tensor``."""
        return average(experts, torch.ones(len(experts))).to(base.dtype)
