"""Preferences over tasks, and how good a set of merged models is at serving them."""

from lightning_merge.pareto.agreement import uniformity
from lightning_merge.pareto.fronts import HypervolumeEstimate, hypervolume, pareto_mask
from lightning_merge.pareto.grids import (
    das_dennis,
    dirichlet,
    equal,
    interior,
    one_hot,
    pairwise,
    priority,
    response,
)
from lightning_merge.pareto.metrics import Hypervolume, PreferenceAlignment, Uniformity
from lightning_merge.pareto.sweep_result import SweepResult

__all__ = [
    "Hypervolume",
    "HypervolumeEstimate",
    "PreferenceAlignment",
    "SweepResult",
    "Uniformity",
    "das_dennis",
    "dirichlet",
    "equal",
    "hypervolume",
    "interior",
    "one_hot",
    "pairwise",
    "pareto_mask",
    "priority",
    "response",
    "uniformity",
]
