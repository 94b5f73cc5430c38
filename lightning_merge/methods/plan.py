"""What a merge would do, told before any value is read: the dry run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from lightning_merge.methods.base import Treatment, WeightMethod
from lightning_merge.methods.rules import check_rules, coefficients_of
from lightning_merge.states import StateDict, check_compatible, kind_of, shape_of, tied_names


@final
@dataclass(frozen=True)
class PlannedParameter:
    """What one entry of the state dict gets."""

    name: str
    shape: tuple[int, ...]
    treatment: Treatment
    """``method``, ``average`` of the experts, or ``base``: the base's value."""
    coefficients: tuple[float, ...]
    """Factor of each expert's task vector, where the method merges it; empty otherwise."""
    tied_to: str | None
    """The earlier name whose tensor it shares, if any."""

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


def plan(
    method: WeightMethod, base: StateDict, experts: Mapping[str, StateDict]
) -> list[PlannedParameter]:
    """List what each entry of the base would get, in the base's order.

    Only names and shapes are read, so that lazily read models of any size are planned at once.

    Raises:
        ValueError: As ``method.merge`` would for keys, shapes, kinds and rules that do not fit.
    """
    check_compatible(base, experts)
    check_rules(tuple(experts), tuple(base), method.coefficients)
    ties = tied_names(base)
    planned = []
    for name in base:
        treatment = method.treatment(name, kind_of(base, name))
        factors = coefficients_of(name, tuple(experts), method.coefficients)
        planned.append(
            PlannedParameter(
                name=name,
                shape=shape_of(base, name),
                treatment=treatment,
                coefficients=factors if treatment == "method" else (),
                tied_to=ties.get(name),
            )
        )
    return planned


def peak_entries(planned: list[PlannedParameter], num_experts: int) -> int:
    """Entries held at once by a streamed merge: the largest parameter of base, experts, result."""
    return (num_experts + 2) * max((parameter.size for parameter in planned), default=0)
