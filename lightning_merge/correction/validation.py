"""Held-out errors of a whole correction, from the statistics of its folds alone."""

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
from lightning_merge.correction.mixing import held_out_error
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
    scaled_identity: float | None = None
    """Without any, but for the best common factor of the features, which changes no decision."""

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
    errors = {task: [0.0, 0.0] for task in names}
    for group, w in zip(groups, weights, strict=True):
        check_widths({task: statistics[task] for task in group})
        for number in range(statistics[group[0]].num_folds):
            _add_fold(correction, group, w, rows, number, errors)
    return {
        task: _relative(correction.fitted.fit(task).total, rows[task], *errors[task])
        for task in names
    }


def _add_fold(
    correction: ClosedFormCorrection,
    names: list[str],
    weights: Tensor,
    rows: Mapping[str, Tensor | None],
    number: int,
    errors: dict[str, list[float]],
) -> None:
    held_out = {task: correction.statistics[task].fold(number) for task in names}
    if not any(fold.n > 0 for fold in held_out.values()):
        return
    fits = []
    for task in names:
        fit = correction.fitted.mixed(task) if len(names) > 1 else correction.fitted.fit(task)
        fits.append(fit.refitted(fit.total.without(held_out[task])))
    maps = _solved(correction, fits, names, weights)
    for task, fit in zip(names, fits, strict=True):
        fold, H = held_out[task], rows[task]
        errors[task][0] += held_out_error(fit, maps, fold, H)
        if fold.cross.shape[0] == fold.cross.shape[1]:
            eye = torch.eye(len(fold.cross)).to(fold.cross)
            errors[task][1] += fold.read_by(H).error(eye if H is None else H)


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


def _relative(
    total: Moments, rows: Tensor | None, corrected: float, identity: float
) -> HeldOutError:
    read = total.read_by(rows)
    k, d = total.cross.shape
    # Behind a head, errors of a fold lack the energy of what the head reads (see `read_by`).
    missing = 0.0 if rows is None else read.energy
    variance = read.centred().energy
    if not variance > 0:
        raise ValueError("the expert's features are constant: no error is relative to them.")
    return HeldOutError(
        corrected=(corrected + missing) / variance,
        identity=(identity + missing) / variance if k == d else None,
        scaled_identity=_scaled(total, rows) / variance if k == d else None,
    )


def _scaled(total: Moments, rows: Tensor | None) -> float:
    """Squared error of the best multiple of the merged features."""
    read = total.read_by(rows)
    eye = torch.eye(len(total.gram)).to(total.gram) if rows is None else rows
    energy = float(((eye @ total.gram) * eye).sum())
    common = max(float((read.cross * eye).sum()), 0.0)
    return read.energy - (common**2 / energy if energy > 0 else 0.0)


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

    Checked behind the heads, at equal preference and for every task under its own, against the best
    multiple of the merged features: a merge shrinks features, which costs squared error but no
    decision. Statistics that leave no samples out cannot tell, which is a warning too.

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
        errors = cross_validated_errors(correction, preference, heads).values()
        pairs = [(e.corrected, e.scaled_identity) for e in errors if e.scaled_identity is not None]
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
