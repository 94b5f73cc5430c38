"""Task arithmetic: the base plus the scaled sum of the task vectors."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lightning_merge.functional.task_arithmetic import task_arithmetic
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.checks import check_scale


@final
@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(WeightMethod):
    """Adds the scaled sum of the experts' task vectors to the base."""

    elementwise: ClassVar[bool] = True

    scale: float = 0.3
    """Coefficient λ shared by all task vectors; dimensionless, in [0, 1] in the paper."""

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter, as in ``WeightMethod.merge_tensor``."""
        return task_arithmetic(base, experts, torch.full((len(experts),), self.scale))
