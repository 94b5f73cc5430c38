"""Does the label-free score rank merges as their true accuracy does?

``python -m benchmarks.selection [--suites NAME ...] [--seeds N ...]``
"""

import statistics
import warnings
from dataclasses import dataclass

import torch
from jsonargparse import auto_cli
from scipy.stats import spearmanr

from benchmarks.features import Merge, merge, references
from benchmarks.results import mean_and_spread, table, write
from benchmarks.suites import SUITES, build
from lightning_merge.correction import CorrectionOptions
from lightning_merge.correction.validation import cross_validated_errors
from lightning_merge.methods import MergeMethod, TaskArithmetic
from lightning_merge.selecting import brief, default_candidates

LIMIT = 500
"""Calibration samples of each task."""

CORRECTIONS = (
    CorrectionOptions(),
    CorrectionOptions(metric="representation"),
    CorrectionOptions(metric="representation", prior="procrustes", beta=1e-2),
    CorrectionOptions(metric="representation", prior="procrustes", beta=1e-6),
    CorrectionOptions(prior="procrustes", beta=1e-2),
)


@dataclass(frozen=True)
class Trial:
    """One merge under one correction."""

    name: str
    is_base: bool
    error: float
    """The label-free score."""
    accuracy: float
    """Normalized, on the test sets, at equal preference."""
    uncorrected: float


def trials(method: MergeMethod, merged: Merge) -> list[Trial]:
    """Every correction of one merge, scored without and with labels."""
    tasks = list(merged.test)
    equal = dict.fromkeys(tasks, 1 / len(tasks))
    plain = statistics.fmean(merged.scores(None, None).values())
    found = []
    for options in CORRECTIONS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            correction = merged.correction(options)
            errors = cross_validated_errors(correction, equal, heads=merged.heads)
        accuracy = statistics.fmean(merged.scores(correction, equal).values())
        error = statistics.fmean(e.corrected for e in errors.values())
        is_base = method == TaskArithmetic(scale=0.0)
        name = f"{brief(method)}; {brief(options)}"
        found.append(Trial(name, is_base, error, accuracy, plain))
    return found


def main(suites: list[str] = list(SUITES), seeds: list[int] = [0, 1, 2]) -> None:  # noqa: B006
    """Write docs/results/selection.md.

    Args:
        suites: Which suites.
        seeds: Which seeds.
    """
    torch.set_num_threads(1)
    rows, details = [], []
    for suite in suites:
        columns: list[list[float]] = [[] for _ in range(6)]
        kept = []
        for seed in seeds:
            experts = build(suite, seed)
            known = references(experts, LIMIT)
            tried: list[Trial] = []
            for method in default_candidates(len(experts.tasks)):
                tried += trials(method, merge(experts, method, known, limit=LIMIT))
            chosen = min(tried, key=lambda t: t.error)
            best = max(tried, key=lambda t: t.accuracy)
            first = tried[0]
            values = (
                float(spearmanr([-t.error for t in tried], [t.accuracy for t in tried]).statistic),
                first.uncorrected,
                first.accuracy,
                max(t.accuracy for t in tried if t.is_base),
                chosen.accuracy,
                best.accuracy,
            )
            for column, value in zip(columns, values, strict=True):
                column.append(value)
            kept.append(chosen.name)
            print(suite, seed, [round(v, 3) for v in values], chosen.name, flush=True)
        rows.append([suite, *(mean_and_spread(column) for column in columns)])
        details.append(f"- {suite}: " + "; ".join(f"`{name}`" for name in kept))
        _write(seeds, rows, details)


def _write(seeds: list[int], rows: list[list[str]], details: list[str]) -> None:
    header = [
        "suite",
        "Spearman",
        "average, uncorrected",
        "average, default",
        "base, best correction",
        "selected",
        "best by labels",
    ]
    write(
        "selection",
        "Selecting a merge without labels",
        seeds,
        [
            "Every method of `default_candidates` (the base among them) under "
            f"{len(CORRECTIONS)} corrections, calibrated on {LIMIT} unlabeled samples a task. "
            "Spearman: rank correlation of the label-free score, the cross-validated error behind "
            "the heads at equal preference, with test accuracy. The other columns are normalized "
            "accuracies at equal preference.",
            table(header, rows),
            "Selected, by seed:",
            "\n".join(details),
        ],
    )


if __name__ == "__main__":
    auto_cli(main)
