"""What a method that looks at data gives beside the merged weights: plain data for the record."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lightning_merge.methods.base import CalibratedMethod


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A merge, and what was found on the way to it."""

    state: dict[str, Tensor]
    """The merged state dict."""
    method: "CalibratedMethod | None" = None
    """The method with what it took from a file, for the record; None: as it was given."""
