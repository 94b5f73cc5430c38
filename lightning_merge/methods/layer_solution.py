"""The solution of one layer: ridge, coefficients, and whether they beat the heuristics."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_merge.functional.bases import FREE, Basis, BasisName, Directions, make_basis
from lightning_merge.functional.coefficients import (
    Ridge,
    Start,
    chosen_ridge,
    held_out,
    solve_system,
)
from lightning_merge.functional.projection import Quadratic
from lightning_merge.functional.quadratic import Constraint


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """How layers are solved."""

    basis: BasisName
    ridge: Ridge = None
    constraint: Constraint = Constraint()  # noqa: RUF009 (frozen)
    directions: Directions = "residual"
    rank: int | None = None
    num_blocks: int = 8
    safeguard: bool = True

    def for_kind(self, kind: str) -> "LayerOptions":
        """Norms and embeddings are least squares of their own, channel by channel."""
        if kind not in ("norm", "embedding") or self.basis == "full":
            return self
        return LayerOptions(basis="full", safeguard=self.safeguard)


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer; energies are shares of the residual energy."""

    name: str
    basis: str
    captured: float
    """By the update, on the calibration samples; NaN if there was nothing to capture."""
    held_out: float
    """By the coefficients of the other folds; NaN without folds."""
    heuristics: dict[str, float]
    """By the fallback and by each included method."""
    ridge: float
    """Relative ridge."""
    rank: int
    """Rank of the system, where one system serves the layer; else -1."""
    unknowns: int
    kept: str
    """What the layer got: ``solution``, or the heuristic that was better on samples left out."""
    coefficients: tuple[float, ...] = ()
    """Where one set serves the whole layer."""
    ridge_source: str = "default"
    """What chose the ridge, see :class:`lightning_merge.functional.coefficients.ChosenRidge`."""


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """All that the solution of a layer needs."""

    name: str
    total: Quadratic
    folds: Sequence[Quadratic]
    deltas: Tensor
    """Task vectors, (T, g, o, i)."""
    heuristics: dict[str, Tensor]
    """Updates (g, o, i) by name, the fallback's first; all but it are elements of the basis."""
    preference: Tensor
    """(T,), the coefficients that a ridge pulls towards."""
    observations: float
    """Columns times outputs."""


def solve_layer(inputs: LayerInputs, options: LayerOptions) -> tuple[Tensor, LayerReport]:
    """The update (g, o, i) of one layer, and what is to be said about it."""
    total, included = inputs.total, list(inputs.heuristics.values())[1:]
    scores = {name: total.captured(update) for name, update in inputs.heuristics.items()}
    nothing = torch.zeros_like(total.cross)
    if not total.energy > 0 or not bool(inputs.deltas.any()):
        return nothing, LayerReport(
            inputs.name, options.basis, math.nan, math.nan, scores, 0.0, 0, 0, "base"
        )
    elements = _elements(inputs, included, options.basis)
    start = Start(
        update=torch.tensordot(inputs.preference, inputs.deltas, 1),
        weights=_weights(inputs.preference, len(elements), options.basis),
    )

    def make(quadratic: Quadratic) -> Basis:
        return make_basis(
            options.basis,
            quadratic,
            elements,
            directions=options.directions,
            rank=options.rank,
            num_blocks=options.num_blocks,
        )

    chosen = chosen_ridge(make, total, inputs.folds, start, options.ridge, inputs.observations)
    ridge = chosen.value
    basis = make(total)
    system = basis.system(total)
    found = solve_system(
        system, basis.start(start.update, start.weights), ridge, options.constraint
    )
    update = basis.update(found)
    single = len(system.gram) == 1
    rank = int(torch.linalg.matrix_rank(system.gram[0], hermitian=True)) if single else -1
    error = math.nan
    if options.safeguard and len(inputs.folds) > 1:
        error = held_out(make, total, inputs.folds, start, ridge, options.constraint)
    kept, update = _guarded(inputs, update, error)
    return update, LayerReport(
        name=inputs.name,
        basis=options.basis,
        captured=total.captured(update),
        held_out=1 - error / total.energy,
        heuristics=scores,
        ridge=ridge,
        rank=rank,
        unknowns=system.gram.shape[-1],
        kept=kept,
        coefficients=tuple(found[0, 0].tolist()) if single and options.basis not in FREE else (),
        ridge_source=chosen.source,
    )


def _elements(inputs: LayerInputs, included: Sequence[Tensor], basis: BasisName) -> Tensor:
    if basis == "span":
        return torch.stack(list(included))
    if not included or basis in FREE:
        return inputs.deltas
    return torch.cat([inputs.deltas, torch.stack(list(included))])


def _weights(preference: Tensor, elements: int, basis: BasisName) -> Tensor:
    if basis == "span":
        return torch.full((elements,), 1 / elements, dtype=torch.float64)
    return torch.cat([preference, preference.new_zeros(max(0, elements - len(preference)))])


def _guarded(inputs: LayerInputs, update: Tensor, error: float) -> tuple[str, Tensor]:
    """The solution, unless a heuristic has a lower error than it has on samples left out."""
    if math.isnan(error):
        return "solution", update
    # Heuristics are not fitted to the samples: their error is the same in and out of sample.
    errors = {name: inputs.total.objective(u) for name, u in inputs.heuristics.items()}
    best = min(errors, key=lambda name: errors[name])
    if errors[best] < error:
        return best, inputs.heuristics[best]
    return "solution", update


def warn_of_reports(reports: Sequence[LayerReport], basis: BasisName, ridge: Ridge) -> None:
    """Name the layers whose samples were too few to choose a ridge, or to fix all coefficients."""
    few = [r for r in reports if r.ridge_source == "too few samples"]
    if few:
        warnings.warn(
            f"ridge='auto' cannot be chosen for {len(few)} layers, whose samples are too few "
            f"for their unknowns, and is the default there: "
            f"{', '.join(f'{r.name} ({r.ridge:g})' for r in few[:5])}. Give more calibration "
            "inputs, or a ridge.",
            stacklevel=4,
        )
    lacking = [r for r in reports if 0 <= r.rank < r.unknowns]
    if basis in FREE and ridge != 0:
        return  # the ridge settles what the inputs leave open
    if lacking:
        shown = ", ".join(f"{r.name} (rank {r.rank} of {r.unknowns})" for r in lacking[:5])
        warnings.warn(
            f"{len(lacking)} layers do not determine all of their coefficients; those nearest "
            f"to the average were taken: {shown}. Elements are collinear, or there are too "
            "few calibration samples.",
            stacklevel=4,
        )
