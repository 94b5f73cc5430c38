"""Checks of hyper-parameters that several methods share: ``ValueError`` with the range."""

import math


def check_scale(scale: float) -> None:
    """A coefficient of task vectors is a finite number, of any sign."""
    if not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, found {scale}.")


def check_density(density: float) -> None:
    """A density lies in (0, 1]."""
    if not 0 < density <= 1:
        raise ValueError(
            f"density must lie in (0, 1], found {density}; it is a fraction, not percent."
        )


def check_range(name: str, value: float, low: float, high: float) -> None:
    """A number lies in the closed range from ``low`` to ``high``."""
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], found {value}.")
