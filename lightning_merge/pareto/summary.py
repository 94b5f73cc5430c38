"""The numbers of ``summary.json``, and the sentences that warn of a merge that does not pay."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_merge.pareto.fronts import hypervolume
from lightning_merge.pareto.metrics import PreferenceAlignment, Uniformity

if TYPE_CHECKING:
    from lightning_merge.pareto.sweep_result import SweepResult


def summarize(result: "SweepResult") -> dict[str, Any]:
    """Reference rows, hypervolume, uniformity and alignment of a sweep as plain JSON data."""
    return {
        "tasks": list(result.tasks),
        "metric": result.metric,
        "higher_is_better": result.higher_is_better,
        "normalization": result.normalization,
        "rows": {name: _row(result, raw) for name, raw in result.rows().items()},
        "hypervolume": {
            "raw": _volume(result.raw, result.references["base"], result.higher_is_better),
            "normalized": _volume(result.normalized, None, maximize=True),
        },
        "uniformity": _uniformity(result),
        "alignment": _alignment(result),
        "timings": {stage: float(seconds) for stage, seconds in result.timings.items()},
        "versions": dict(result.versions),
    }


def _row(result: "SweepResult", raw: Tensor) -> dict[str, Any]:
    normalized = result.normalize(raw)
    return {
        "raw": dict(zip(result.tasks, map(_plain, raw), strict=True)),
        "raw_mean": _plain(raw.mean()),
        "normalized": dict(zip(result.tasks, map(_plain, normalized), strict=True)),
        "normalized_mean": _plain(normalized.mean()),
    }


def _volume(values: Tensor, base: Tensor | None, maximize: bool) -> dict[str, Any] | None:
    """Against zero; a loss has no zero to count up from, so there the base is the reference."""
    if not bool(torch.isfinite(values).all()):
        return None
    reference = [0.0] * values.shape[-1] if maximize or base is None else base.tolist()
    found = hypervolume(values, reference, maximize=maximize)
    return {
        "value": found.value,
        "error": found.error,
        "method": found.method,
        "reference_point": list(found.reference),
    }


def _uniformity(result: "SweepResult") -> float | None:
    """Over interior preferences; a score above one (not an accuracy) has no loss to speak of."""
    if result.higher_is_better and bool((result.raw > 1).any()):
        return None
    if not result.higher_is_better and bool((result.raw < 0).any()):
        return None
    # A result is whole on every process, so none waits for the others here.
    best = 1.0 if result.higher_is_better else None
    measure = Uniformity(best=best, sync_on_compute=False)
    measure.update(result.preferences, result.raw)
    return _plain(measure.compute())


def _alignment(result: "SweepResult") -> dict[str, Any] | None:
    if not bool(torch.isfinite(result.normalized).all()):
        return None
    measure = PreferenceAlignment(sync_on_compute=False)  # larger normalized values are better
    measure.update(result.preferences, result.normalized)
    summary: dict[str, Any] = {}
    for name, value in measure.compute().items():
        if value.ndim == 0:
            summary[name] = _plain(value)
        else:
            summary[name] = {
                "mean": _plain(value.nanmean()),
                "per_task": dict(zip(result.tasks, map(_plain, value), strict=True)),
            }
    return summary


def sweep_warnings(result: "SweepResult") -> list[str]:
    """Sentences on merges that lose to the base, and on tasks that the correction hurts."""
    rows, sentences = result.rows(), []
    sign = 1.0 if result.higher_is_better else -1.0
    base, names = result.references["base"], {"uncorrected": "The uncorrected merge"}
    names |= {"equal": "The corrected merge at equal preference"}
    for row, subject in names.items():
        if row in rows and float(sign * (rows[row].mean() - base.mean())) < 0:
            sentences.append(
                f"{subject} loses to the base: mean {result.metric} {_show(rows[row].mean())} "
                f"against {_show(base.mean())}."
            )
    for row, when in (
        ("equal", "at equal preference"),
        ("one_hot", "even under its own one-hot preference"),
    ):
        if row not in rows:
            continue
        for other, name in (("uncorrected", "the uncorrected merge"), ("base", "the base")):
            worse = sign * (rows[row] - result.references[other]) < 0
            hurt = [
                f"{task} ({_show(rows[row][i])} against {_show(result.references[other][i])})"
                for i, task in enumerate(result.tasks)
                if bool(worse[i])
            ]
            if hurt:
                sentences.append(f"Worse than {name} {when}: {', '.join(hurt)}.")
    bad = [
        task for i, task in enumerate(result.tasks) if float(result.references["experts"][i]) <= 0
    ]
    if bad:
        sentences.append(
            f"The expert has a {result.metric} of zero (or less) on {', '.join(bad)}: there is no "
            "normalized value to compare with."
        )
    return sentences


def _show(value: Tensor) -> str:
    return f"{float(value):.3f}"


def _plain(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
