"""How much of the residual energy of each layer every basis captures, and every heuristic."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_merge.functional.bases import Basis, BasisName, make_basis
from lightning_merge.functional.coefficients import Start, default_ridge, held_out, solve_system
from lightning_merge.functional.projection import Quadratic, joined_system
from lightning_merge.functional.quadratic import Constraint
from lightning_merge.layers.problem import LayerProblem, TaskScale
from lightning_merge.layers.sites import Site
from lightning_merge.layers.statistics import LayerSums
from lightning_merge.methods.layerwise import LayerWalk
from lightning_merge.states import StateDict

BASES: tuple[BasisName, ...] = (
    "task_global",
    "task",
    "block",
    "subspace",
    "row",
    "rotated_row",
    "full",
)
"""From the coarsest to the finest; ``row`` and ``rotated_row`` contain neither the other."""


@dataclass(frozen=True)
class LayerDiagnosis:
    """Shares of one layer's residual energy, all tasks counting alike."""

    name: str
    kind: str
    energy: float
    """Residual energy over the energy of the experts' outputs, summed over tasks: how much the
    experts' outputs differ from the base's. The layer's weight in means over layers."""
    in_sample: Mapping[str, float]
    """Captured by the best unconstrained coefficients of each basis."""
    held_out: Mapping[str, float]
    """Captured on each fold by coefficients of the others, with the default ridge."""
    heuristics: Mapping[str, float]
    """Captured by the updates of other methods; below 0 is worse than the base."""

    @property
    def irreducible(self) -> float:
        """Energy that no single weight captures: the tasks' own conflict, on these samples."""
        return 1 - self.in_sample["full"]


def diagnose_layers(
    walk: LayerWalk,
    statistics: Mapping[str, Sequence[LayerSums]],
    heuristics: Mapping[str, StateDict],
    preference: Tensor,
    task_scale: TaskScale = "per_energy",
) -> list[LayerDiagnosis]:
    """Diagnose every layer from the experts' inputs; no pass over the inputs.

    Args:
        walk: Base, experts and layers.
        statistics: Sums of the experts' inputs by layer and task.
        heuristics: Merged weights by name.
        preference: (T,), sums to one.
        task_scale: What makes tasks comparable.
    """
    problems = {}
    for site in walk.sites:
        problem = walk.problem(site, statistics[site.name])
        weights = problem.weights(preference.tolist(), task_scale)
        total, folds = problem.weighted(weights)
        if total.energy > 0 and bool(problem.deltas.any()):
            problems[site.name] = (site, problem, total, folds)
    coefficients = _shared(problems, preference)
    found = []
    for site, problem, total, folds in problems.values():
        updates = {
            name: site.matrix(state, bias=walk.options.bias) - walk.matrix(site)
            for name, state in heuristics.items()
        }
        inside, outside = _captured(problem, total, folds, preference)
        whole, parts = coefficients
        inside["task_global"] = total.captured(torch.tensordot(whole, problem.deltas, 1))
        errors = [
            fold.objective(torch.tensordot(alpha, problem.deltas, 1))
            for fold, alpha in zip(folds, parts, strict=True)
        ]
        outside["task_global"] = (
            1 - math.fsum(errors) / total.energy if len(folds) > 1 else math.nan
        )
        found.append(
            LayerDiagnosis(
                name=site.name,
                kind=site.kind,
                energy=_relative_energy(problem),
                in_sample={name: inside[name] for name in BASES},
                held_out={name: outside[name] for name in BASES},
                heuristics={name: total.captured(update) for name, update in updates.items()},
            )
        )
    return found


def _captured(
    problem: LayerProblem, total: Quadratic, folds: Sequence[Quadratic], preference: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    start = Start(update=torch.tensordot(preference, problem.deltas, 1), weights=preference)
    inside: dict[str, float] = {}
    outside: dict[str, float] = {}
    for name in BASES:
        if name == "task_global":
            continue
        # Norms and embeddings are solved freely whatever the basis: their rows are their channels.
        chosen: BasisName = "full" if problem.site.kind in ("norm", "embedding") else name
        make = _maker(chosen, problem.deltas)
        basis = make(total)
        inside[name] = basis.system(total).captured
        error = held_out(make, total, folds, start, default_ridge(basis), Constraint())
        outside[name] = 1 - error / total.energy
    return inside, outside


def _maker(name: BasisName, deltas: Tensor) -> Callable[[Quadratic], Basis]:
    # Of all directions, those that a linear update can reach are the best for a subspace.
    directions = "reachable" if name == "subspace" else "residual"

    def make(quadratic: Quadratic) -> Basis:
        return make_basis(name, quadratic, deltas, directions=directions)  # type: ignore[arg-type]

    return make


Problems = Mapping[str, tuple[Site, LayerProblem, Quadratic, list[Quadratic]]]


def _shared(problems: Problems, preference: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Coefficients that all layers share: from all samples, and without each fold."""
    totals, by_fold = [], []
    for _, problem, total, folds in problems.values():
        basis = make_basis("task", total, problem.deltas)
        totals.append(basis.system(total))
        by_fold.append([basis.system(fold) for fold in folds])
    if not totals:
        return preference, []
    start = preference.expand(1, 1, -1)
    whole = joined_system(totals)
    parts = []
    for fold in zip(*by_fold, strict=True):
        rest = whole.minus(joined_system(fold))
        parts.append(solve_system(rest, start, 1e-6, Constraint())[0, 0])
    return solve_system(whole, start, 0.0, Constraint())[0, 0], parts


def _relative_energy(problem: LayerProblem) -> float:
    pairs = zip(problem.totals, problem.target_energies, strict=True)
    return math.fsum(total.energy / energy for total, energy in pairs if energy > 0)


def energy_mean(
    layers: Sequence[LayerDiagnosis], value: Callable[[LayerDiagnosis], float]
) -> float:
    """Mean over layers, weighted by their relative residual energy; NaN without any."""
    total = math.fsum(layer.energy for layer in layers)
    if not total > 0:
        return math.nan
    return math.fsum(layer.energy * value(layer) for layer in layers) / total
