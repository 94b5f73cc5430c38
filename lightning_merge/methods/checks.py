"""Checks of hyper-parameters that several methods share: ``ValueError`` with the range."""

import math
from collections.abc import Iterable, Mapping


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


def in_order(weights: Mapping[str, float], tasks: Iterable[str]) -> dict[str, float]:
    """Weights by task in the experts' order, of which each must have one."""
    tasks = list(tasks)
    missing = [task for task in tasks if task not in weights]
    unknown = [task for task in weights if task not in tasks]
    if missing or unknown:
        raise ValueError(
            f"weights must name every expert once: {', '.join(tasks)}; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}."
        )
    return {task: weights[task] for task in tasks}
