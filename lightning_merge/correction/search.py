"""Finding the ridge and the prior of one task from its statistics, with no second data pass."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_merge.correction.choice import (
    DEFAULT_BETA,
    BetaMode,
    Choice,
    PriorName,
    beta_unit,
    prior_matrix,
)
from lightning_merge.correction.fit import Bias
from lightning_merge.correction.moments import Moments
from lightning_merge.functional.gcv import ridge_spectrum
from lightning_merge.functional.kfold import HeldOutCurve, RotatedFold, rotated_fold
from lightning_merge.functional.parallel import map_on_cores
from lightning_merge.functional.procrustes import similarity_scale

GRID = torch.logspace(-8, 4, 81, dtype=torch.float64)
"""Relative ridges that are tried; infinity is tried too."""
ANCHORS = (0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


Split = tuple[Moments, Moments, RotatedFold]
"""Training moments, held-out moments, and both in the eigenbasis of the former."""


@dataclass(frozen=True)
class BetaSearch:
    """How ``beta="auto"`` and ``prior="auto"`` are found."""

    criterion: Literal["kfold", "gcv", "evidence"] = "kfold"
    """``kfold``: exact held-out error from per-fold statistics; ``gcv``: generalised
    cross-validation; ``evidence``: empirical Bayes. The last two do not charge for the prior and
    choose only the ridge."""
    gamma: float = 1.4
    """Charge for a degree of freedom in ``gcv``; at least 1."""
    one_standard_error: bool = False
    """Take the strongest ridge within one standard error of the best, over folds."""
    anchors: Sequence[float] = ANCHORS
    """Pulls to the identity tried with ``prior="auto"``, in units of tr(G)/d."""

    def __post_init__(self) -> None:
        if not self.gamma >= 1:
            raise ValueError(f"gamma={self.gamma}: expected at least 1.")
        if not self.anchors or any(not a >= 0 or math.isinf(a) for a in self.anchors):
            raise ValueError(f"anchors={self.anchors}: expected finite numbers of at least 0.")


@dataclass(frozen=True)
class Found:
    """What a search found for one task."""

    choice: Choice
    score: float
    """Its held-out squared error (or score) on all samples."""
    baseline: float | None
    """The squared error of doing nothing; None for unequal widths."""
    betas: list[float]
    """Relative ridges tried with the prior that was chosen."""
    curve: list[float]
    """Their scores."""
    at_edge: bool
    """Whether the best ridge is the weakest that was tried."""


@dataclass(frozen=True)
class SearchProblem:
    """All that a search for one task needs."""

    task: str
    total: Moments
    folds: Sequence[Moments]
    bias: Bias
    beta_mode: BetaMode
    candidates: Sequence[Choice]
    """Priors to try; their ridges are ignored."""
    given: Tensor | None = None
    proper: bool = False
    refine: bool = True
    rows: Tensor | None = None
    """Head that reads the representation, (r, k): errors are measured behind it."""
    beta: float | None = None
    """The ridge, if only the prior is sought, in the units of ``beta_mode``."""


def search(problem: SearchProblem, options: BetaSearch) -> Found | None:
    """The best of the candidates, or None if there is not enough data to tell.

    Ties go to the earlier candidate and to the stronger ridge.
    """
    if options.criterion == "kfold":
        return _search_folds(problem, options)
    return _search_in_sample(problem, options)


def candidates(
    prior: str, anchor: float, *, square: bool, anchors: Sequence[float]
) -> list[Choice]:
    """Priors that a search tries: the one asked for, or every one for ``"auto"``."""
    if prior != "auto":
        return [Choice(prior=prior, anchor=anchor)]  # type: ignore[arg-type]
    if not square:
        return [Choice(prior="procrustes"), Choice(prior="scaled")]
    both: tuple[PriorName, PriorName] = ("procrustes", "scaled")
    return [Choice(prior="identity"), *(Choice(prior=p, anchor=a) for a in anchors for p in both)]


@dataclass(frozen=True)
class _Folds:
    """What all candidates of a search share."""

    splits: Sequence[Split]
    grid: Tensor
    """Ridges to try, (B,), in units of ``units``."""
    units: Sequence[float]
    """Absolute ridge of one unit, by fold."""
    offset: float
    """Error that no map changes and the curves leave out."""
    slack: float
    """Differences below this are rounding."""


def _search_folds(problem: SearchProblem, options: BetaSearch) -> Found | None:
    folds = _prepared(problem)
    if folds is None:
        return None
    candidate, curves, scores = _best_candidate(problem, folds)
    if problem.beta is None:
        beta, score = _best_beta(curves, scores, folds, options)
        choice = _in_units(replace(candidate, beta=beta, searched=True), problem)
    else:
        beta, score = problem.beta, float(scores.sum())
        choice = replace(candidate, beta=beta)
    return Found(
        choice=choice,
        score=score + folds.offset,
        baseline=_doing_nothing(problem),
        betas=folds.grid.tolist() if problem.beta is None else [beta],
        curve=(scores.sum(0) + folds.offset).tolist(),
        at_edge=problem.beta is None and beta <= float(GRID[0]) * (1 + 1e-9),
    )


def _prepared(problem: SearchProblem) -> _Folds | None:
    """None if there are fewer than two folds, or one leaves nothing to be trained on."""
    if len(problem.folds) < 2:
        return None
    splits = map_on_cores(
        lambda fold: _split(problem, fold), problem.folds, size=problem.total.gram.numel()
    )
    floor = 1e-10 * float(problem.total.gram.trace())
    if any(not float(train.gram.trace()) > floor for train, _, _ in splits):
        return None
    grid, units = GRID, [beta_unit("relative", train) for train, _, _ in splits]
    if problem.beta is not None:
        grid = torch.ones(1, dtype=torch.float64)
        units = [_fixed_unit(problem, train) for train, _, _ in splits]
    offset = 0.0 if problem.rows is None else _read_energy(problem)
    slack = 1e-12 * (offset + math.fsum(fold.energy for _, fold, _ in splits))
    return _Folds(splits, grid, units, offset, slack)


def _best_candidate(
    problem: SearchProblem, folds: _Folds
) -> tuple[Choice, list[HeldOutCurve], Tensor]:
    """The prior with the least error on the grid, its curves, and their scores (F, B)."""
    best: tuple[float, Choice, list[HeldOutCurve], Tensor] | None = None
    rotations: dict[tuple[int, float], tuple[Tensor, float]] = {}
    for candidate in problem.candidates:
        curves = _curves(problem, candidate, folds, rotations)
        scores = _fold_scores(curves, folds.units, folds.grid)
        score = float(scores.sum(0).min())
        if problem.beta is None:
            score = min(score, sum(curve.prior_error for curve in curves))
        # A later candidate must be better by more than rounding.
        if best is None or score < best[0] - folds.slack:
            best = (score, candidate, curves, scores)
    assert best is not None
    return best[1:]


def _fixed_unit(problem: SearchProblem, train: Moments) -> float:
    """The given ridge on these samples; a vanishing one is made just large enough to divide by."""
    assert problem.beta is not None
    smallest = 1e-12 * beta_unit("relative", train)
    return max(problem.beta * beta_unit(problem.beta_mode, train), smallest)


def _doing_nothing(problem: SearchProblem) -> float | None:
    """Error of the merged features as they are; nothing is fitted, so nothing is held out."""
    k, d = problem.total.cross.shape
    if k != d:
        return None
    read = torch.eye(k).to(problem.total.cross) if problem.rows is None else problem.rows
    return problem.total.read_by(problem.rows).error(read)


def _split(problem: SearchProblem, fold: Moments) -> Split:
    train = problem.total.without(fold)
    if problem.bias != "none":
        fold = fold.shifted(train.mean_merged, train.mean_expert)
        train = train.centred()
    read_train, read_fold = train.read_by(problem.rows), fold.read_by(problem.rows)
    rotated = rotated_fold(
        read_train.cross, train.gram, read_fold.cross, fold.gram, read_fold.energy
    )
    return train, fold, rotated


def _curves(
    problem: SearchProblem,
    candidate: Choice,
    folds: _Folds,
    rotations: dict[tuple[int, float], tuple[Tensor, float]],
) -> list[HeldOutCurve]:
    """The curves of all folds; each is a decomposition of its own, so cores share them."""
    return map_on_cores(
        lambda f: _curve(problem, candidate, f, folds.splits[f], rotations),
        range(len(folds.splits)),
        size=problem.total.gram.numel(),
    )


def _curve(
    problem: SearchProblem,
    candidate: Choice,
    number: int,
    split: Split,
    rotations: dict[tuple[int, float], tuple[Tensor, float]],
) -> HeldOutCurve:
    """The curve of one fold; turned rotations are kept for the scaled prior of the same anchor."""
    train, _, rotated = split
    key = (number, candidate.anchor)
    if candidate.prior == "scaled" and key in rotations:
        turned, scale = rotations.pop(key)
        return rotated.curve(scale * turned)
    # Refining a prior for k < d takes hundreds of decompositions; folds do without.
    prior = prior_matrix(candidate, train, given=problem.given, proper=problem.proper, refine=False)
    turned = (prior if problem.rows is None else problem.rows @ prior) @ rotated.basis
    if candidate.prior == "procrustes":
        rotations[key] = (turned, similarity_scale(prior, train.cross, train.gram))
    return rotated.curve(turned)


def _fold_scores(curves: Sequence[HeldOutCurve], units: Sequence[float], betas: Tensor) -> Tensor:
    """Errors (F, B) at relative ridges (B,)."""
    return torch.stack(
        [curve((betas * unit).to(curve.linear)) for curve, unit in zip(curves, units, strict=True)]
    ).cpu()


def _best_beta(
    curves: Sequence[HeldOutCurve], scores: Tensor, folds: _Folds, options: BetaSearch
) -> tuple[float, float]:
    """Relative ridge and its summed held-out error; infinity wins ties up to rounding."""

    def total(beta: float) -> float:
        return float(
            _fold_scores(curves, folds.units, torch.tensor([beta], dtype=torch.float64)).sum()
        )

    beta, score = _golden(total, scores.sum(0))
    limit = sum(curve.prior_error for curve in curves)
    best = (math.inf, limit) if limit <= score + folds.slack else (beta, score)
    if not options.one_standard_error:
        return best
    at_best = _fold_scores(curves, folds.units, torch.tensor([best[0]], dtype=torch.float64))
    tried = torch.cat([scores, torch.tensor([[c.prior_error] for c in curves])], 1)
    excess = tried - at_best
    allowed = excess.std(0) * len(curves) ** 0.5
    good = (excess.sum(0) <= allowed).nonzero().flatten().tolist()
    ridges = [*GRID.tolist(), math.inf]
    stronger = [(ridges[i], float(tried[:, i].sum())) for i in good if ridges[i] > best[0]]
    return max(stronger, default=best)


def _golden(value: Callable[[float], float], grid_scores: Tensor) -> tuple[float, float]:
    """Refine the best grid point by golden-section search on the logarithm."""
    # Of scores that are equal but for noise, the last: the strongest ridge.
    low_score = float(grid_scores.min())
    index = int((grid_scores <= low_score + 1e-6 * abs(low_score)).nonzero()[-1])
    best = (float(GRID[index]), float(grid_scores[index]))
    low = math.log(float(GRID[max(index - 1, 0)]))
    high = math.log(float(GRID[min(index + 1, len(GRID) - 1)]))
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    f_left, f_right = value(math.exp(left)), value(math.exp(right))
    for _ in range(16):
        if f_left < f_right:
            high, right, f_right = right, left, f_left
            left = high - ratio * (high - low)
            f_left = value(math.exp(left))
        else:
            low, left, f_left = left, right, f_right
            right = low + ratio * (high - low)
            f_right = value(math.exp(right))
    refined = min((f_left, left), (f_right, right))
    return (math.exp(refined[1]), refined[0]) if refined[0] < best[1] else best


def _read_energy(problem: SearchProblem) -> float:
    """Held-out energy of what the head reads, which no map changes, summed over the folds."""
    if problem.bias == "none":
        return problem.total.read_by(problem.rows).energy
    total = problem.total.read_by(problem.rows)
    shift = 0.0
    for fold in problem.folds:
        mean = total.without(fold.read_by(problem.rows)).mean_expert
        part = fold.read_by(problem.rows).sum_expert
        shift += fold.n * float(mean @ mean) - 2 * float(part @ mean)
    return total.energy + shift


def _search_in_sample(problem: SearchProblem, options: BetaSearch) -> Found:
    if len(problem.candidates) != 1:
        raise ValueError(
            f"prior='auto' needs held-out errors, which criterion='{options.criterion}' has not: "
            "use criterion='kfold', or name the prior."
        )
    (candidate,) = problem.candidates
    moments = problem.total if problem.bias == "none" else problem.total.centred()
    prior = prior_matrix(
        candidate, moments, given=problem.given, proper=problem.proper, refine=problem.refine
    )
    if problem.rows is not None:
        prior = problem.rows @ prior
        moments = moments.read_by(problem.rows)
    spectrum = ridge_spectrum(
        moments.cross,
        moments.gram,
        moments.energy,
        prior,
        moments.n,
        centred=problem.bias != "none",
    )
    unit = beta_unit("relative", moments)

    def scores(betas: Tensor) -> Tensor:
        absolute = (betas * unit).to(spectrum.explained)
        if options.criterion == "gcv":
            return spectrum.gcv(absolute, options.gamma).cpu()
        return spectrum.negative_log_evidence(absolute).cpu()

    curve = scores(GRID)
    beta, score = _golden(lambda b: float(scores(torch.tensor([b], dtype=GRID.dtype))), curve)
    limit = float(scores(torch.tensor([math.inf], dtype=GRID.dtype)))
    if limit <= score:
        beta, score = math.inf, limit
    return Found(
        choice=_in_units(replace(candidate, beta=beta, searched=True), problem),
        score=score,
        baseline=_doing_nothing(problem),
        betas=GRID.tolist(),
        curve=curve.tolist(),
        at_edge=beta <= float(GRID[0]) * (1 + 1e-9),
    )


def _in_units(choice: Choice, problem: SearchProblem) -> Choice:
    """The same ridge in the units of the beta mode."""
    moments = problem.total if problem.bias == "none" else problem.total.centred()
    ratio = beta_unit("relative", moments) / beta_unit(problem.beta_mode, moments)
    return replace(choice, beta=choice.beta * ratio)


def fallback(problem: SearchProblem) -> Choice:
    """Choice where nothing can be held out: the named or default prior and ridge, and a warning."""
    only = problem.candidates[0] if len(problem.candidates) == 1 else Choice(prior="procrustes")
    choice = replace(only, beta=DEFAULT_BETA)
    warnings.warn(
        f"task '{problem.task}': {problem.total.count} calibration samples in "
        f"{len(problem.folds)} folds are too few to choose by; prior '{only.prior}' and the "
        f"default ridge ({DEFAULT_BETA} of the mean feature energy, unless one was given) are "
        "used. Calibrate on more samples, or with num_folds.",
        stacklevel=2,
    )
    if problem.beta is not None:
        return replace(choice, beta=problem.beta)
    return _in_units(choice, problem)
