"""Coefficients of a basis: ridge, constraints, and their error on folds left out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_merge.functional.bases import FREE, Basis
from lightning_merge.functional.kfold import rotated_fold
from lightning_merge.functional.projection import Quadratic, System
from lightning_merge.functional.quadratic import Constraint, solve_constrained
from lightning_merge.functional.ridge import ridge_towards

Ridge: TypeAlias = float | Literal["auto"] | None
SMALL_RIDGE = 1e-6
FREE_RIDGE = 1e-3
GRID = torch.logspace(-8, 2, 41, dtype=torch.float64)
"""Relative ridges that ``auto`` tries."""

MakeBasis: TypeAlias = Callable[[Quadratic], Basis]


@dataclass(frozen=True, eq=False)
class Start:
    """What a ridge pulls towards."""

    update: Tensor
    """(g, o, i), for free matrices."""
    weights: Tensor
    """(E,), for coefficients."""


def ridge_unit(system: System) -> float:
    """Absolute ridge of a relative one: the mean of the diagonal of Q."""
    return float(system.gram.diagonal(dim1=-2, dim2=-1).mean())


def solve_system(system: System, start: Tensor, ridge: float, constraint: Constraint) -> Tensor:
    """Coefficients (b, k, K) that minimise the objective plus a ridge towards ``start``.

    Args:
        system: Least squares in the coefficients.
        start: (b, k, K).
        ridge: Relative to :func:`ridge_unit`.
        constraint: Of the coefficients of each of the b problems, for k = 1.
    """
    absolute = ridge * ridge_unit(system)
    if constraint.is_free:
        return ridge_towards(system.cross, system.gram, start, absolute)
    gram = system.gram + absolute * torch.eye(system.gram.shape[-1]).to(system.gram)
    cross = system.cross + absolute * start
    return solve_constrained(gram, cross[:, 0], constraint, start[:, 0])[:, None]


def default_ridge(basis: Basis) -> float:
    """Relative ridge of a basis."""
    return FREE_RIDGE if basis.name in FREE else SMALL_RIDGE


def chosen_ridge(
    make: MakeBasis, total: Quadratic, folds: Sequence[Quadratic], start: Start, ridge: Ridge
) -> float:
    """The relative ridge: the one given, the basis's own, or that of the least held-out error.

    With ``auto``, constraints do not enter the search. It needs two folds with samples, and falls
    back to the basis's own ridge without.
    """
    if isinstance(ridge, (int, float)):
        return float(ridge)
    basis = make(total)
    used = [fold for fold in folds if fold.energy > 0]
    if ridge is None or len(used) < 2:
        return default_ridge(basis)
    scores = torch.zeros_like(GRID)
    for fold in used:
        rest = total.minus(fold)
        trained = make(rest)
        train, test = trained.system(rest), trained.system(fold)
        curves = rotated_fold(train.cross, train.gram, test.cross, test.gram, test.energy)
        prior = trained.start(start.update, start.weights)
        scores += curves.curve(prior @ curves.basis)(GRID * ridge_unit(train)).cpu()
    # Ties go to the stronger ridge.
    return float(GRID.flip(0)[scores.flip(0).argmin()])


def held_out(
    make: MakeBasis,
    total: Quadratic,
    folds: Sequence[Quadratic],
    start: Start,
    ridge: float,
    constraint: Constraint,
) -> float:
    """Objective of each fold under the coefficients of the others, summed; NaN without folds."""
    used = [fold for fold in folds if fold.energy > 0]
    if len(used) < 2:
        return math.nan
    error = 0.0
    for fold in used:
        rest = total.minus(fold)
        error += fold_error(make(rest), (rest, None), (fold, None), start, ridge, constraint)
    return error


WithRows: TypeAlias = tuple[Quadratic, System | None]
"""An objective, and its row system with the elements of a basis where it is known."""


def fold_error(
    basis: Basis,
    rest: WithRows,
    fold: WithRows,
    start: Start,
    ridge: float,
    constraint: Constraint,
) -> float:
    """Objective of one fold under the coefficients of the others.

    Args:
        basis: Made from the others.
        rest: Objective of the others.
        fold: Objective of the fold.
        start: What the ridge pulls towards.
        ridge: Relative, see :func:`ridge_unit`.
        constraint: Of the coefficients.
    """
    prior = basis.start(start.update, start.weights)
    found = solve_system(basis.system(*rest), prior, ridge, constraint)
    if fold[1] is not None and basis.is_plain:
        return basis.system(*fold).objective(found)
    return fold[0].objective(basis.update(found))
