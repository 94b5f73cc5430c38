"""Held-out errors of a whole correction, from the statistics of its folds alone."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from lightning_merge.correction.checks import Head, check_heads, check_widths
from lightning_merge.correction.closed_form import ClosedFormCorrection
from lightning_merge.correction.fit import TaskFit
from lightning_merge.correction.head_maps import HeadSolver, read_rows
from lightning_merge.correction.mixture import shared_maps
from lightning_merge.correction.moments import Moments
from lightning_merge.correction.statistics import CorrectionStatistics
from lightning_merge.functional.preference import Preference, as_preference


@dataclass(frozen=True)
class HeldOutError:
    """Held-out squared error of one task, relative to the expert's own variance.

    0 is the expert; 1 is as far off as a constant.
    """

    corrected: float
    """With the correction."""
    identity: float | None
    """Without any: the merged features as they are. None for unequal widths."""
    scaled: float = math.nan
    """With the correction, up to the best common factor, which changes no order of the logits."""
    scaled_identity: float | None = None
    """Without any, up to the best common factor."""

    @property
    def gain(self) -> float | None:
        """Part of the error of doing nothing that the correction removes; negative is harm."""
        if self.identity is None:
            return None
        return 1 - self.corrected / self.identity if self.identity > 0 else 0.0


def cross_validated_errors(
    correction: ClosedFormCorrection,
    preference: Preference | None = None,
    heads: Mapping[str, Head] | None = None,
) -> dict[str, HeldOutError]:
    """Errors of a correction on samples it was not solved from, with no second data pass.

    For every fold, all tasks are solved again without it, with the prior and ridge that were
    chosen on all samples, and measured on it. Errors of different merges, metrics, priors and
    ridges are comparable if measured alike: that is how a merge is selected without labels.

    Args:
        correction: Any; solved in its own metric.
        preference: One for all tasks together. None gives each task its own map (one-hot).
        heads: Measure behind these heads (all tasks with weight need one). None measures features,
            or, for ``metric="head"``, behind the heads of the correction.

    Returns:
        By task, for the tasks with positive preference (or samples).

    Raises:
        ValueError: If a task has samples in fewer than two folds, or heads don't fit.
    """
    statistics = correction.statistics
    if preference is None:
        names = [task for task in statistics if statistics[task].count]
        groups = [[task] for task in names]
        weights = [torch.ones(1, 1, dtype=torch.float64) for _ in names]
    else:
        p = as_preference(preference, correction.tasks, strict=correction.strict)
        names = [task for task, x in zip(correction.tasks, p.tolist(), strict=True) if x > 0]
        groups = [names]
        weights = [correction.solver.weights(p[None])[:, p > 0]]
    _check_folds({task: statistics[task] for task in names})
    heads = correction.fitted.heads if heads is None else heads
    if heads is not None:
        check_heads(heads, statistics)
    rows = {task: _measured_rows(correction, heads, task) for task in names}
    images = dict.fromkeys(names, (0.0, 0.0))
    for group, w in zip(groups, weights, strict=True):
        check_widths({task: statistics[task] for task in group})
        for number in range(statistics[group[0]].num_folds):
            _add_fold(correction, group, w, rows, number, images)
    return {
        task: _relative(correction.fitted.fit(task).total, rows[task], images[task])
        for task in names
    }


def _add_fold(
    correction: ClosedFormCorrection,
    names: list[str],
    weights: Tensor,
    rows: Mapping[str, Tensor | None],
    number: int,
    images: dict[str, tuple[float, float]],
) -> None:
    """Add what the heads read of one fold under the maps of the others; see ``Moments.image``."""
    held_out = {task: correction.statistics[task].fold(number) for task in names}
    if not any(fold.n > 0 for fold in held_out.values()):
        return
    fits = []
    for task in names:
        fit = correction.fitted.mixed(task) if len(names) > 1 else correction.fitted.fit(task)
        fits.append(fit.refitted(fit.total.without(held_out[task])))
    maps = _solved(correction, fits, names, weights)
    for task, fit in zip(names, fits, strict=True):
        if held_out[task].n == 0:
            continue
        weight, bias = fit.split(maps)
        H = rows[task]
        if H is not None:
            weight, bias = H @ weight, None if bias is None else H @ bias
        energy, common = held_out[task].read_by(H).image(weight, bias)
        images[task] = images[task][0] + energy, images[task][1] + common


def _solved(
    correction: ClosedFormCorrection, fits: list[TaskFit], names: list[str], weights: Tensor
) -> Tensor:
    if correction.aggregation != "data_aware":
        raise ValueError(
            f"aggregation='{correction.aggregation}' mixes finished maps and is not "
            "cross-validated: use aggregation='data_aware'."
        )
    own_rows = [correction.fitted.rows(task) for task in names]
    solver_rows = [H for H in own_rows if H is not None]
    if solver_rows:
        return HeadSolver(fits, solver_rows, correction.options.head).maps(weights)[0]
    return shared_maps(fits, weights)[0]


def _measured_rows(
    correction: ClosedFormCorrection, heads: Mapping[str, Head] | None, task: str
) -> Tensor | None:
    if heads is None:
        return None
    if task not in heads:
        raise ValueError(f"task '{task}': no head to measure behind; heads of {sorted(heads)}.")
    like = correction.fitted.fit(task).total.cross
    return read_rows(heads[task][0], like, correction.options.head)


def _relative(total: Moments, rows: Tensor | None, image: tuple[float, float]) -> HeldOutError:
    read = total.read_by(rows)
    k, d = total.cross.shape
    variance = read.centred().energy
    if not variance > 0:
        raise ValueError("the expert's features are constant: no error is relative to them.")
    corrected, scaled = _errors(read.energy, *image)
    identity = scaled_identity = None
    if k == d:  # nothing is fitted, so nothing need be held out
        same = torch.eye(k).to(total.cross) if rows is None else rows
        identity, scaled_identity = (e / variance for e in _errors(read.energy, *read.image(same)))
    return HeldOutError(
        corrected=corrected / variance,
        identity=identity,
        scaled=scaled / variance,
        scaled_identity=scaled_identity,
    )


def _errors(target: float, energy: float, common: float) -> tuple[float, float]:
    """Squared error of an image of the features, and of its best non-negative multiple."""
    gained = max(common, 0.0) ** 2 / energy if energy > 0 else 0.0
    return target - 2 * common + energy, target - gained


def _check_folds(statistics: Mapping[str, CorrectionStatistics]) -> None:
    few = [task for task, s in statistics.items() if len(s.folds()) < 2]
    numbers = {task: s.num_folds for task, s in statistics.items()}
    if few or len(set(numbers.values())) > 1:
        raise ValueError(
            f"held-out errors need equal numbers of folds, at least two with samples; found "
            f"{numbers}, too few samples in {few}. Calibrate on more samples, with num_folds."
        )


def warn_of_harm(
    correction: ClosedFormCorrection, heads: Mapping[str, Head], *, stacklevel: int = 2
) -> list[str]:
    """Warn where a correction is no better than none on samples it was not solved from.

    Checked behind the heads, at equal preference and for every task under its own. Only second
    moments are known, so it is squared errors of logits that are compared, not decisions. Merging
    shrinks features and so does a ridge, which costs squared error but no decision: where logits
    compete, both sides are measured up to a factor. Where a logit stands alone (a head of one row,
    or ``HeadMetric(centre=False)``) its scale matters, and errors are compared as they are.
    Statistics that leave no samples out cannot tell, which is a warning too.

    Args:
        correction: The correction.
        heads: Head of every task.
        stacklevel: As for ``warnings.warn``, counted from the caller.

    Returns:
        What was warned of: ``"equal"``, ``"one_hot"`` or ``"unknown"``; empty if all is well or
        widths differ, so that there is no merge without a correction.
    """
    tasks = correction.tasks
    if any(len(correction.statistics[task].folds()) < 2 for task in tasks):
        warnings.warn(
            "too few calibration samples, or no folds, to tell whether the correction helps. "
            "Calibrate on more samples.",
            stacklevel=stacklevel + 1,
        )
        return ["unknown"]
    harmful = []
    for name, preference in (("equal", dict.fromkeys(tasks, 1 / len(tasks))), ("one_hot", None)):
        errors = cross_validated_errors(correction, preference, heads)
        compared = (_compared(correction, heads[task], e) for task, e in errors.items())
        pairs = [pair for pair in compared if pair is not None]
        if not pairs:
            return []
        corrected, identity = (fmean(column) for column in zip(*pairs, strict=True))
        if corrected > identity * (1 + 1e-9) + 1e-12:
            harmful.append(name)
            warnings.warn(
                f"the correction does harm at {name.replace('_', '-')} preference on samples left "
                f"out (mean relative error {corrected:.3g} with it, {identity:.3g} without). "
                "Calibrate on more samples, take beta='auto', prior='auto' or metric='head', or "
                "use uncorrected().",
                stacklevel=stacklevel + 1,
            )
    return harmful


def _compared(
    correction: ClosedFormCorrection, head: Head, error: HeldOutError
) -> tuple[float, float] | None:
    """Errors with the correction and without, of what counts behind this head."""
    if error.identity is None or error.scaled_identity is None:
        return None
    if correction.options.head.centre and len(head[0]) > 1:
        return error.scaled, error.scaled_identity
    return error.corrected, error.identity
