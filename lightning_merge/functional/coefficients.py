"""Coefficients of a basis: ridge, constraints, and their error on folds left out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_merge.functional.bases import FREE, Basis
from lightning_merge.functional.gcv import ridge_spectrum
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


@dataclass(frozen=True)
class ChosenRidge:
    """A relative ridge, and where it comes from."""

    value: float
    source: Literal["given", "default", "folds", "gcv", "too few samples"]
    """``too few samples``: ``auto`` had nothing to go by, and it is the basis's own."""


Split: TypeAlias = tuple[System, System, Tensor]
"""A system to train on, one of the samples left out, and what the ridge pulls towards."""


def chosen_ridge(
    make: MakeBasis,
    total: Quadratic,
    folds: Sequence[Quadratic],
    start: Start,
    ridge: Ridge,
    observations: float,
) -> ChosenRidge:
    """The relative ridge: the one given, the basis's own, or with ``auto`` :func:`searched_ridge`.

    Args:
        make: Gives the basis for the samples to train on.
        total: The objective on all samples.
        folds: On each fold.
        start: What the ridge pulls towards.
        ridge: What is asked for.
        observations: Columns times outputs.
    """
    if isinstance(ridge, (int, float)):
        return ChosenRidge(float(ridge), "given")
    basis = make(total)
    if ridge is None:
        return ChosenRidge(default_ridge(basis), "default")
    splits: list[Split] = []
    for fold in folds:
        if fold.energy > 0:
            rest = total.minus(fold)
            trained = make(rest)
            prior = trained.start(start.update, start.weights)
            splits.append((trained.system(rest), trained.system(fold), prior))
    prior = basis.start(start.update, start.weights)
    return searched_ridge(basis.system(total), prior, splits, observations, default_ridge(basis))


def searched_ridge(
    total: System, prior: Tensor, splits: Sequence[Split], observations: float, default: float
) -> ChosenRidge:
    r"""The relative ridge of the least error on samples left out; constraints do not enter.

    Without two folds with samples, that of the least generalised cross-validation, with the N
    observations, and the residuals and degrees of freedom of all problems together:

    .. math:: N\,\mathrm{RSS} / (N - 1.4\,\mathrm{DF})^2

    Args:
        total: The system of all samples.
        prior: What the ridge pulls towards, (b, k, K).
        splits: One for each fold with samples.
        observations: N.
        default: Taken where even the strongest ridge leaves too many degrees of freedom.
    """
    if len(splits) > 1:
        scores = torch.zeros_like(GRID)
        for train, test, towards in splits:
            curves = rotated_fold(train.cross, train.gram, test.cross, test.gram, test.energy)
            scores += curves.curve(towards @ curves.basis)(GRID * ridge_unit(train)).cpu()
        return ChosenRidge(_strongest_least(scores), "folds")
    # Of k observations each.
    samples = observations / total.cross.shape[-2]
    spectrum = ridge_spectrum(total.cross, total.gram, total.energy, prior, samples)
    scores = spectrum.gcv((GRID * ridge_unit(total)).to(total.gram)).cpu()
    if not bool(scores.isfinite().any()):
        return ChosenRidge(default, "too few samples")
    return ChosenRidge(_strongest_least(scores), "gcv")


def _strongest_least(scores: Tensor) -> float:
    """The ridge of the least score; ties go to the stronger one."""
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
