"""Does the residual-energy diagnostic rank merges as their true accuracy does?

``python -m benchmarks.diagnose_validation [--suites NAME ...] [--seeds N ...]``

The points of every suite and seed are kept in ``runs/diagnose_validation``; a run that was stopped
goes on there.
"""

import json
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.features import Merge, References, features_of, references
from benchmarks.results import mean_and_spread, run, table, write
from benchmarks.suites import ROOT, SUITES, Experts, build
from lightning_merge.files import write_json
from lightning_merge.layers.collecting import Collecting
from lightning_merge.layers.statistics import Sampling
from lightning_merge.merging import MergeInputs, calibration_for
from lightning_merge.methods import (
    TIES,
    Average,
    CalibratedMethod,
    IsoC,
    MergeMethod,
    OutputProjection,
    RegMean,
    TaskArithmetic,
    TSVMerge,
    WeightMethod,
)
from lightning_merge.methods.layer_diagnosis import network_shares
from lightning_merge.methods.layerwise import LayerWalk
from lightning_merge.methods.projection import ALL_KINDS
from lightning_merge.selecting import brief
from lightning_merge.states import StateDict

LIMIT = 300
"""At most as many calibration samples of each task for the scores, and as many others for methods
that are fitted; half of a smaller set each."""
RESAMPLES = 2000
KEPT = Path("runs/diagnose_validation")
SCALES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)


def candidates() -> list[MergeMethod]:
    """Methods and coefficients, good and bad."""
    return [
        *(TaskArithmetic(scale=scale) for scale in SCALES),
        *(TIES(scale=scale) for scale in (0.3, 0.6, 1.0, 1.5)),
        *(TSVMerge(scale=scale) for scale in (0.5, 1.0)),
        *(IsoC(scale=scale) for scale in (0.5, 1.0, 1.5)),
        Average(),
        RegMean(),
        *(OutputProjection(basis=b, mode="parallel") for b in ("task_global", "task", "row")),
        OutputProjection(mode="parallel"),
        OutputProjection(basis="task"),
        OutputProjection(),
    ]


@dataclass(frozen=True)
class Point:
    """One merge."""

    name: str
    layers: float
    """Residual energy captured, mean over layers weighted by it."""
    representation: float
    """Residual energy captured where the heads read, mean over tasks."""
    accuracy: float
    """Normalized, uncorrected, mean over tasks."""
    sequential: bool
    """Whether its layers were fitted to the merged network's inputs, not the experts'."""


def points(experts: Experts, methods: Sequence[MergeMethod] | None = None) -> list[Point]:
    """Both scores and the accuracy of every candidate of one suite and seed."""
    known = references(experts, LIMIT)
    tasks = list(experts.tasks)

    halves = {t: min(LIMIT, len(d.calibration) // 2) for t, d in experts.tasks.items()}

    def inputs(second: int) -> MergeInputs:
        found = {
            t: d.calibration[second * halves[t] : (1 + second) * halves[t]]
            for t, d in experts.tasks.items()
        }
        return calibration_for(
            experts.pool, found, module=experts.template, tasks=tasks, batch_size=100
        )

    scored, fitted = inputs(0), inputs(1)
    methods = candidates() if methods is None else methods
    states = {brief(method): _merged(method, fitted) for method in methods}
    sequential = {
        brief(method)
        for method in methods
        if isinstance(method, OutputProjection) and method.mode == "sequential"
    }
    walk = LayerWalk(
        scored.base,
        scored.experts,
        scored.calibration,
        Average(),
        ALL_KINDS,
        Collecting(sampling=Sampling(num_folds=None), bias=True),
    )
    equal = torch.full((len(tasks),), 1 / len(tasks), dtype=torch.float64)
    layers = network_shares(walk, walk.expert_statistics(), states, equal)
    base = features_of(experts, dict(scored.base), known, limit=LIMIT)
    found = []
    for name, state in states.items():
        merged = features_of(experts, state, known, limit=LIMIT)
        found.append(
            Point(
                name=name,
                layers=layers[name],
                representation=_captured(merged, base, known, halves),
                accuracy=statistics.fmean(merged.scores(None, None).values()),
                sequential=name in sequential,
            )
        )
    return found


def _merged(method: MergeMethod, fitted: MergeInputs) -> StateDict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(method, WeightMethod):
            return method.merge(fitted.base, fitted.experts)
        assert isinstance(method, CalibratedMethod)
        return method.merge(fitted.base, fitted.experts, fitted.calibration)


def _captured(merged: Merge, base: Merge, known: References, halves: Mapping[str, int]) -> float:
    shares = []
    for task, features in merged.calibration.items():
        rows = slice(0, halves[task])
        expert = known.calibration[task][rows].double()
        left = (features[rows].double() - expert).square().sum()
        whole = (base.calibration[task][rows].double() - expert).square().sum()
        shares.append(float(1 - left / whole))
    return statistics.fmean(shares)


def _kept_points(suite: str, seed: int, root: Path) -> list[Point]:
    file = KEPT / f"{suite}-{seed}.json"
    if file.exists():
        return [Point(**point) for point in json.loads(file.read_text())["points"]]
    start = time.process_time()
    found = points(build(suite, seed, root))
    seconds = time.process_time() - start
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(point) for point in found]
    write_json(file, {"cpu_seconds": seconds, "points": rows})
    return found


def rank_correlation(scores: Sequence[float], accuracies: Sequence[float], seed: int = 0):
    """Spearman's correlation, and the 95 % interval of a bootstrap over the merges."""
    x, y = np.array(scores), np.array(accuracies)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        rows = rng.integers(0, len(x), len(x))
        if len(set(x[rows])) > 1 and len(set(y[rows])) > 1:
            drawn.append(spearmanr(x[rows], y[rows]).statistic)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(spearmanr(x, y).statistic), float(low), float(high)


def main(
    suites: list[str] = ["glyphs-convnext", "tables-transformer"],  # noqa: B006
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    root: Path = ROOT,
) -> None:
    """Write docs/results/diagnosis.md from the experts in runs/bench.

    Args:
        suites: Which suites.
        seeds: Which seeds.
        root: Folder of the experts.
    """
    torch.set_num_threads(1)
    merges: dict[str, list[list[Point]]] = {}
    for suite in suites:
        assert suite in SUITES, f"unknown suite {suite}; there are {', '.join(SUITES)}"
        for seed in seeds:
            merges.setdefault(suite, []).append(_kept_points(suite, seed, root))
            print(suite, seed, [_cell(score.of(merges[suite][-1])) for score in SCORES], flush=True)
            _write(seeds, merges)


@dataclass(frozen=True)
class Score:
    """One way to rank merges."""

    name: str
    field: str
    only_fixed: bool = False
    """Without merges that were fitted to the merged network's inputs."""

    def kept(self, found: Sequence[Point]) -> list[Point]:
        return [p for p in found if not (self.only_fixed and p.sequential)]

    def of(self, found: Sequence[Point]) -> tuple[float, float, float]:
        """Rank correlation with accuracy, and its interval."""
        kept = self.kept(found)
        return rank_correlation([getattr(p, self.field) for p in kept], [p.accuracy for p in kept])

    def first(self, found: Sequence[Point]) -> float:
        """Accuracy of the merge ranked first, over that of the best."""
        kept = self.kept(found)
        first = max(kept, key=lambda p: getattr(p, self.field))
        return first.accuracy / max(p.accuracy for p in kept)


SCORES = (
    Score("layers", "layers"),
    Score("layers, without sequential", "layers", only_fixed=True),
    Score("representation", "representation"),
)


def verdict(score: Score, runs: Sequence[Sequence[Point]]) -> str:
    """What the figures say of one score, and no more."""
    found = [score.of(points) for points in runs]
    first = [score.first(points) for points in runs]
    lowest = min(low for _, low, _ in found)
    if lowest > 0.5:
        says = "ranks merges as accuracy does"
    elif lowest > 0:
        says = "is related to accuracy, but not closely enough to choose by"
    else:
        says = "**does not reliably predict accuracy**"
    values = [value for value, _, _ in found]
    return (
        f"- *{score.name}* {says}: correlations from {min(values):.2f} to {max(values):.2f} in "
        f"{len(runs)} runs, lowest end of an interval {lowest:.2f}. The merge it ranks first has "
        f"{statistics.fmean(first):.3f} of the best one's accuracy on average, {min(first):.3f} "
        "in the worst run."
    )


def _cell(found: tuple[float, float, float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*found)


def _write(seeds: list[int], merges: dict[str, list[list[Point]]]) -> None:
    runs = [points for found in merges.values() for points in found]
    rows = [
        [f"{suite}, seed {seed}", str(len(points)), *(_cell(score.of(points)) for score in SCORES)]
        for suite, found in merges.items()
        for seed, points in zip(seeds, found, strict=False)
    ]
    sections = [
        "\n".join(verdict(score, runs) for score in SCORES),
        "Both scores need no label and are measured on "
        f"up to {LIMIT} calibration samples a task that no method was fitted to. *Layers*: the "
        "residual energy captured on the experts' own inputs, mean over layers weighted by "
        "it. *Representation*: the same where the heads read, after a pass of the merged network. "
        "Rank correlation (Spearman) with normalized test accuracy of the uncorrected merge; in "
        "brackets the 95 % interval of a bootstrap over the merges. The merges share experts and "
        "are no independent sample, so the interval says how much depends on their choice, and "
        "nothing about other suites. Sequential merges are fitted to the merged network's inputs "
        "and make up for its drift: on the experts' inputs their layers look bad though they are "
        "not.",
        table(["suite", "merges", *(score.name for score in SCORES)], rows),
    ]
    for suite, seeds_found in merges.items():
        names = [point.name for point in seeds_found[0]]
        lines = []
        for index, name in enumerate(names):
            same = [found[index] for found in seeds_found]
            lines.append(
                [
                    f"`{name}`",
                    *(
                        mean_and_spread([getattr(point, column) for point in same])
                        for column in ("layers", "representation", "accuracy")
                    ),
                ]
            )
        lines.sort(key=lambda line: line[3], reverse=True)
        sections += [f"## {suite}", table(["merge", "layers", "representation", "accuracy"], lines)]
    write(
        "diagnose_validation", "Does the diagnostic predict accuracy?", seeds, sections, "diagnosis"
    )


if __name__ == "__main__":
    run(main)
