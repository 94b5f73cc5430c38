"""What a method that looks at data gives beside the merged weights: plain data for the record."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from lightning_merge.methods.calibrated import CalibratedMethod

PlannedTreatment: TypeAlias = Literal["method", "mean", "average", "fallback", "base", "unknown"]
"""What an entry of a state dict gets: see ``methods/plan.py``."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A merge, and what was found on the way to it."""

    state: dict[str, Tensor]
    """The merged state dict."""
    method: "CalibratedMethod | None" = None
    """The method with what it took from a file, for the record; None: as it was given."""
    found: Mapping[str, Any] = field(default_factory=dict)
    """What fits into a manifest: numbers, texts, and short lists and mappings of them."""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What does not, by name of a file beside it: plain data of a JSON file, or the named tensors
    of a safetensors file."""
    treatments: Mapping[str, PlannedTreatment] | None = None
    """What entries got that the method itself did not merge; None: not known."""


def as_plain(value: Any) -> Any:
    """Plain data for JSON: five digits of a number, None for what is not finite."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): as_plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(part) for part in value]
    return value
