"""What a correction did, task by task, as plain data."""

import math
from typing import TYPE_CHECKING, Any

import torch

from lightning_merge.correction.choice import beta_unit, prior_matrix
from lightning_merge.correction.fit import TaskFit
from lightning_merge.correction.mixing import held_out_error
from lightning_merge.correction.statistics import CorrectionStatistics
from lightning_merge.functional.procrustes import numerical_rank, similarity_scale
from lightning_merge.functional.ridge import solve_right

if TYPE_CHECKING:
    from lightning_merge.correction.closed_form import ClosedFormCorrection


def task_reports(correction: "ClosedFormCorrection") -> dict[str, dict[str, Any]]:
    """The report of every task with samples; see ``ClosedFormCorrection.report``."""
    shares = influence(correction)
    reports = {}
    for task in shares:
        fit = correction.fitted.fit(task)
        report = {
            "samples": fit.total.count,
            **fit.choice.as_dict(),
            "beta_relative": _plain(fit.beta / beta_unit("relative", fit.fitted)),
            "share": shares[task],
            "r2": r_squared(fit),
            **_conditioning(fit),
            "distortion": distortion_table(fit, correction.statistics[task]),
        }
        found = correction.fitted.found.get(task)
        if found is not None and correction.options.search.criterion == "kfold":
            energy = correction.fitted.energy(task)
            report["cross_validation"] = {
                "relative_error": _plain(found.score / energy),
                "relative_error_of_doing_nothing": None
                if found.baseline is None
                else found.baseline / energy,
                "betas": found.betas,
                "curve": [_plain(value / energy) for value in found.curve],
                "at_edge": found.at_edge,
            }
        reports[task] = report
    return reports


def influence(correction: "ClosedFormCorrection") -> dict[str, float | None]:
    r"""Share :math:`\mathrm{tr}(w_t C_t M^{-1}) / d` of each task at equal preference.

    None where it is not defined: for different expert widths, or a ridge at its limit.
    """
    statistics = {t: s for t, s in correction.statistics.items() if s.count}
    if len({s.dim_expert for s in statistics.values()}) > 1:
        return dict.fromkeys(statistics)
    fits = [correction.fitted.mixed(task) for task in statistics]
    if any(fit.ridge in (0, math.inf) for fit in fits):
        return dict.fromkeys(statistics)
    p = torch.tensor([float(t in statistics) for t in correction.tasks], dtype=torch.float64)
    weights = correction.solver.weights((p / p.sum())[None])[0]
    used = (weights[p > 0] / weights.max()).to(fits[0].curvature)
    parts = [w * fit.curvature for w, fit in zip(used, fits, strict=True)]
    total = torch.stack(parts).sum(0)
    d = len(total)
    return {
        task: float(solve_right(part, total).trace()) / d
        for task, part in zip(statistics, parts, strict=True)
    }


def r_squared(fit: TaskFit) -> float | None:
    """Part of the centred expert energy that the task's own map explains, on its own samples."""
    centred = fit.total.centred().energy
    error = fit.total.error(*fit.split(fit.own))
    return _plain(1 - error / centred) if centred > 0 else None


def _conditioning(fit: TaskFit) -> dict[str, Any]:
    values = torch.linalg.svdvals(fit.fitted.cross)
    k, d = fit.fitted.cross.shape
    return {
        "rank": numerical_rank(values, max(k, d)) if bool(values[0] > 0) else 0,
        "kappa": _plain(fit.condition),
        "cross_spectrum_ratio": _plain(float(values[-1] / values[0])) if values[0] > 0 else None,
        "cancellation": fit.bias != "none" and fit.total.cancels,
    }


def distortion_table(fit: TaskFit, statistics: CorrectionStatistics) -> dict[str, float] | None:
    """Held-out part of the energy of ``y - z`` that simple maps remove, on the kept folds.

    ``bias`` adds the mean difference, ``rotation`` and ``scaled_rotation`` are the Procrustes
    solutions, ``linear`` is the map of this task with its ridge. None for unequal widths or fewer
    than two folds with samples. Values may be negative: such a map does harm on unseen samples.
    """
    folds = statistics.folds()
    k, d = fit.total.cross.shape
    if k != d or len(folds) < 2:
        return None
    eye = torch.eye(d).to(fit.total.gram)
    errors = dict.fromkeys(("none", "bias", "rotation", "scaled_rotation", "linear"), 0.0)
    for fold in folds:
        train = fit.total.without(fold)
        errors["none"] += fold.error(eye)
        errors["bias"] += fold.error(eye, train.mean_expert - train.mean_merged)
        rotation = prior_matrix(type(fit.choice)(), train)
        errors["rotation"] += fold.error(rotation)
        scale = similarity_scale(rotation, train.cross, train.gram)
        errors["scaled_rotation"] += fold.error(scale * rotation)
        other = fit.refitted(train)
        errors["linear"] += held_out_error(other, other.own, fold, None)
    if errors["none"] <= 1e-12 * fit.total.energy:
        return None
    return {name: 1 - value / errors["none"] for name, value in errors.items() if name != "none"}


def _plain(value: float) -> float | None:
    """A JSON number; None where there is none."""
    return value if math.isfinite(value) else None
