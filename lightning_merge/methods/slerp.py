"""Slerp: the great circle between two experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal, final

import torch
from torch import Tensor

from lightning_merge.functional.slerp import slerp
from lightning_merge.functional.task_arithmetic import add_update, task_vectors_of
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.checks import check_range
from lightning_merge.states import StateDict


@final
@dataclass(frozen=True, kw_only=True)
class Slerp(WeightMethod):
    """Interpolates along the great circle between exactly two experts, parameter by parameter."""

    position: float = 0.5
    """Where to stop: 0 is the first expert, 1 the second."""

    positions: dict[str, float] = field(default_factory=dict)
    """Positions by pattern of parameter names, instead of ``position``; the first match counts."""

    of: Literal["weights", "task_vectors"] = "weights"
    """Interpolate the experts' weights, or their differences to the base."""

    keep_norm: bool = False
    """Interpolate the norm linearly and on its own."""

    def __post_init__(self) -> None:
        check_range("position", self.position, 0.0, 1.0)
        for pattern, position in self.positions.items():
            check_range(f"position of '{pattern}'", position, 0.0, 1.0)

    def patterns(self) -> dict[str, Sequence[str]]:
        """See ``WeightMethod.patterns``."""
        return {**super().patterns(), "positions": tuple(self.positions)}

    def bind(self, base: StateDict, experts: Mapping[str, StateDict]) -> WeightMethod:
        """Check that there are two experts."""
        if len(experts) != 2:
            raise ValueError(
                f"Slerp interpolates between exactly two experts, found {len(experts)}: "
                f"{', '.join(experts)}. Choose two, or use Average."
            )
        return self

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter, as in ``WeightMethod.merge_tensor``."""
        move = partial(slerp, position=self._position(name), keep_norm=self.keep_norm)
        if self.of == "weights":
            first, second = experts.to(torch.promote_types(experts.dtype, torch.float32))
            return move(first, second).to(base.dtype)
        first, second = task_vectors_of(base, experts)
        return add_update(base, move(first, second), 1.0)

    def _position(self, name: str) -> float:
        for pattern, position in self.positions.items():
            if fnmatchcase(name, pattern):
                return position
        return self.position
