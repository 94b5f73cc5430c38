"""How much of the residual energy of each layer every basis captures, and every heuristic."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_merge.functional.bases import FREE, Basis, BasisName, make_basis
from lightning_merge.functional.coefficients import (
    SMALL_RIDGE,
    Start,
    default_ridge,
    fold_error,
    solve_system,
)
from lightning_merge.functional.parallel import map_on_cores
from lightning_merge.functional.projection import (
    Quadratic,
    System,
    joined_system,
    row_system,
    summed_system,
)
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
Shares: TypeAlias = dict[str, float]
LAYERWISE = BASES[1:]
"""Those whose coefficients are solved layer by layer."""


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
    found = []
    for site in walk.calibration.runtime.progress(
        walk.sites, len(walk.sites), "Diagnosing layers", lambda site: site.name
    ):
        layer = _layer(walk.problem(site, statistics[site.name]), preference, task_scale)
        if layer is not None:
            captured = _captured(walk, site, layer.total, heuristics)
            found.append(_Solved(layer.diagnosis(preference, captured), *layer.task_systems()))
    return _with_shared(found, preference)


def network_shares(
    walk: LayerWalk,
    statistics: Mapping[str, Sequence[LayerSums]],
    merges: Mapping[str, StateDict],
    preference: Tensor,
    task_scale: TaskScale = "per_energy",
) -> dict[str, float]:
    """Share that each merge captures, the energy-weighted mean over layers; no basis is solved.

    Args:
        walk: As for :func:`diagnose_layers`.
        statistics: As there.
        merges: Merged weights by name.
        preference: As there.
        task_scale: As there.
    """
    energies: list[float] = []
    shares: dict[str, list[float]] = {name: [] for name in merges}
    for site in walk.sites:
        layer = _layer(walk.problem(site, statistics[site.name]), preference, task_scale)
        if layer is not None:
            energies.append(_relative_energy(layer.problem))
            for name, share in _captured(walk, site, layer.total, merges).items():
                shares[name].append(share)
    return {name: _weighted_mean(energies, values) for name, values in shares.items()}


def _captured(
    walk: LayerWalk, site: Site, total: Quadratic, merges: Mapping[str, StateDict]
) -> dict[str, float]:
    base, bias = walk.matrix(site), walk.options.bias
    updates = ((name, site.matrix(state, bias=bias) - base) for name, state in merges.items())
    return {name: total.captured(update) for name, update in updates}


@dataclass(frozen=True, eq=False)
class _Solved:
    """A layer without its statistics: what is left of them are systems of T unknowns."""

    diagnosis: LayerDiagnosis
    total: System
    """Of one coefficient a task."""
    folds: list[System]


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer's objective over all samples and by fold; its row systems are made once."""

    problem: LayerProblem
    total: Quadratic
    folds: list[Quadratic]

    @cached_property
    def rows(self) -> list[System]:
        """Row systems by fold."""
        return [row_system(fold, self.problem.deltas) for fold in self.folds]

    @cached_property
    def all_rows(self) -> System:
        """The row system of all samples."""
        return joined_system(self.rows)

    def task_systems(self) -> tuple[System, list[System]]:
        """Systems of one coefficient a task: over all samples, and by fold."""
        return summed_system(self.all_rows), [summed_system(rows) for rows in self.rows]

    def diagnosis(self, preference: Tensor, heuristics: Mapping[str, float]) -> LayerDiagnosis:
        """Shares of the bases that are solved layer by layer."""
        inside, outside = _shares(self, preference)
        return LayerDiagnosis(
            name=self.problem.site.name,
            kind=self.problem.site.kind,
            energy=_relative_energy(self.problem),
            in_sample=inside,
            held_out=outside,
            heuristics=heuristics,
        )


def _layer(problem: LayerProblem, preference: Tensor, task_scale: TaskScale) -> _Layer | None:
    """None where the experts' outputs are the base's: there is nothing to capture."""
    total, folds = problem.weighted(problem.weights(preference.tolist(), task_scale))
    if not (total.energy > 0 and bool(problem.deltas.any())):
        return None
    return _Layer(problem, total, folds)


def _shares(layer: _Layer, preference: Tensor) -> tuple[Shares, Shares]:
    """Shares captured in sample and on folds left out, by basis."""
    # Norms and embeddings are solved freely whatever the basis: their rows are their channels.
    alone = layer.problem.site.kind in ("norm", "embedding")
    names: Sequence[BasisName] = ("full",) if alone else LAYERWISE
    inside: Shares = {name: _in_sample(name, layer) for name in names}
    outside: Shares = dict.fromkeys(names, math.nan)
    used = [number for number, fold in enumerate(layer.folds) if fold.energy > 0]
    if len(used) > 1:
        errors = partial(_fold_errors, layer, names, preference)
        parts = map_on_cores(errors, used, size=layer.total.gram.numel())
        for name in names:
            outside[name] = 1 - sum(part[name] for part in parts) / layer.total.energy
    if alone:
        inside = dict.fromkeys(LAYERWISE, inside["full"])
        outside = dict.fromkeys(LAYERWISE, outside["full"])
    return inside, outside


def _fold_errors(
    layer: _Layer, names: Sequence[BasisName], preference: Tensor, number: int
) -> Shares:
    """Errors of every basis on one fold; all that is made of the other folds is made once."""
    deltas = layer.problem.deltas
    start = Start(update=torch.tensordot(preference, deltas, 1), weights=preference)
    fold, rows = layer.folds[number], layer.rows[number]
    rest = (layer.total.minus(fold), layer.all_rows.minus(rows))
    bases = {name: _basis(name, rest[0], deltas) for name in names}
    return {
        name: fold_error(basis, rest, (fold, rows), start, default_ridge(basis), Constraint())
        for name, basis in bases.items()
    }


def _in_sample(name: BasisName, layer: _Layer) -> float:
    basis = _basis(name, layer.total, layer.problem.deltas)
    system = basis.system(layer.total, layer.all_rows)
    return system.captured_with(layer.total.spectrum if name in FREE else None)


def _basis(name: BasisName, quadratic: Quadratic, deltas: Tensor) -> Basis:
    # Of all directions, those that a linear update can reach are the best for a subspace.
    return make_basis(
        name, quadratic, deltas, directions="reachable" if name == "subspace" else "residual"
    )


def _with_shared(layers: Sequence[_Solved], preference: Tensor) -> list[LayerDiagnosis]:
    """Add the shares of coefficients that all layers share, from the sums of their systems."""
    if not layers:
        return []
    start = preference.expand(1, 1, -1)
    whole = joined_system([layer.total for layer in layers])
    best = solve_system(whole, start, 0.0, Constraint())
    parts = []
    for fold in zip(*(layer.folds for layer in layers), strict=True):
        rest = whole.minus(joined_system(fold))
        parts.append(solve_system(rest, start, SMALL_RIDGE, Constraint()))
    return [_shared_shares(layer, best, parts) for layer in layers]


def _shared_shares(layer: _Solved, best: Tensor, parts: Sequence[Tensor]) -> LayerDiagnosis:
    found, energy = layer.diagnosis, layer.total.energy
    errors = [fold.objective(part) for fold, part in zip(layer.folds, parts, strict=True)]
    outside = 1 - math.fsum(errors) / energy if len(parts) > 1 else math.nan
    return replace(
        found,
        in_sample={"task_global": 1 - layer.total.objective(best) / energy, **found.in_sample},
        held_out={"task_global": outside, **found.held_out},
    )


def _relative_energy(problem: LayerProblem) -> float:
    pairs = zip(problem.energies, problem.target_energies, strict=True)
    return math.fsum(residual / energy for residual, energy in pairs if energy > 0)


def energy_mean(
    layers: Sequence[LayerDiagnosis], value: Callable[[LayerDiagnosis], float]
) -> float:
    """Mean over layers, weighted by their relative residual energy; NaN without any."""
    return _weighted_mean([layer.energy for layer in layers], [value(x) for x in layers])


def _weighted_mean(weights: Sequence[float], values: Sequence[float]) -> float:
    total = math.fsum(weights)
    if not total > 0:
        return math.nan
    return math.fsum(w * x for w, x in zip(weights, values, strict=True)) / total
