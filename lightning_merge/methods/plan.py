"""What a merge would do, told before any value is read: the dry run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.calibrated import CalibratedMethod
from lightning_merge.methods.outcome import PlannedTreatment
from lightning_merge.methods.rules import coefficients_of
from lightning_merge.states import (
    StateDict,
    check_compatible,
    dtype_of,
    kind_of,
    shape_of,
    tied_names,
)


@final
@dataclass(frozen=True)
class PlannedParameter:
    """What one entry of the state dict gets."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Its dtype in the base, such as ``float32``; the result has it too."""
    kind: str
    """``floating`` or ``integer``, see :func:`lightning_merge.states.kind_of`."""
    treatment: PlannedTreatment
    """``method``; ``mean`` of the task vectors, where a method for matrices finds none; ``average``
    of the experts; ``fallback``: merged by what the method leaves it to; ``base``: the base's
    value; ``unknown``: a method with data decides."""
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
    method.check_names(tuple(base), tuple(experts))
    planned = plan_plainly(base, experts)
    found = treatments(method, planned, len(experts))
    return [
        replace(
            parameter,
            treatment=treatment,
            coefficients=coefficients_of(parameter.name, tuple(experts), method.coefficients)
            if treatment in ("method", "mean")
            else (),
        )
        for parameter, treatment in zip(planned, found, strict=True)
    ]


def plan_with_data(
    method: CalibratedMethod, base: StateDict, experts: Mapping[str, StateDict]
) -> list[PlannedParameter]:
    """The same for a method with data: what is known without a pass; the rest is ``unknown``.

    Raises:
        ValueError: If the experts do not fit the base.
    """
    return [
        replace(p, treatment=method.known_treatment(p.name, p.shape, p.kind))
        for p in plan_plainly(base, experts)
    ]


def plan_plainly(base: StateDict, experts: Mapping[str, StateDict]) -> list[PlannedParameter]:
    """The same without a method: every treatment is unknown.

    Raises:
        ValueError: If the experts do not fit the base.
    """
    check_compatible(base, experts)
    ties = tied_names(base)
    return [
        PlannedParameter(
            name=name,
            shape=shape_of(base, name),
            dtype=dtype_of(base, name),
            kind=kind_of(base, name),
            treatment="unknown",
            coefficients=(),
            tied_to=ties.get(name),
        )
        for name in base
    ]


def treatments(
    method: WeightMethod, planned: Sequence[PlannedParameter], num_experts: int
) -> list[PlannedTreatment]:
    """What the method gives each parameter."""
    found: list[PlannedTreatment] = []
    for parameter in planned:
        treatment = method.treatment(parameter.name, parameter.kind)
        mean = method.takes_mean(parameter.name, parameter.shape, num_experts)
        found.append("mean" if treatment == "method" and mean else treatment)
    return found


def peak_entries(planned: list[PlannedParameter], num_experts: int) -> int:
    """Entries held at once by a streamed merge: the largest parameter of base, experts, result."""
    return (num_experts + 2) * max((parameter.size for parameter in planned), default=0)
