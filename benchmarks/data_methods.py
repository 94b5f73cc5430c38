"""Every method on experts that were trained: uncorrected, and under three corrections.

``python -m benchmarks.data_methods [--suites NAME ...] [--seeds N ...] [--methods NAME ...]``
"""

import statistics
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.features import Merge, backbone, merge, references
from benchmarks.results import mean_and_spread, run, spent, table, write
from benchmarks.suites import ROOT, Experts, build
from lightning_merge.correction import CorrectionOptions
from lightning_merge.methods import (
    DARE,
    DELLA,
    TIES,
    AdaMerging,
    Average,
    Breadcrumbs,
    Consensus,
    Fisher,
    GreedySoup,
    IsoC,
    IsoCTS,
    MergeMethod,
    ModelStock,
    OutputProjection,
    RegMean,
    TaskArithmetic,
    TSVMerge,
)

METHODS: dict[str, MergeMethod] = {
    "base": TaskArithmetic(scale=0.0),
    "average": Average(),
    "task arithmetic": TaskArithmetic(),
    "TIES": TIES(),
    "DARE": DARE(),
    "DELLA": DELLA(),
    "Breadcrumbs": Breadcrumbs(),
    "Model Stock": ModelStock(),
    "Consensus": Consensus(),
    "TSV-M": TSVMerge(),
    "Iso-C": IsoC(),
    "Iso-CTS": IsoCTS(),
    "Fisher": Fisher(),
    "greedy soup": GreedySoup(),
    "RegMean": RegMean(),
    "RegMean++": RegMean(inputs="merged"),
    "projection, task_global": OutputProjection(basis="task_global", mode="parallel"),
    "projection, task": OutputProjection(basis="task"),
    "projection, row": OutputProjection(basis="row"),
    "projection, full": OutputProjection(basis="full"),
    "AdaMerging, task-wise": AdaMerging(granularity="task"),
    "AdaMerging": AdaMerging(),
    "AdaMerging++": AdaMerging(vectors="ties"),
    "AdaMerging, expert_kl": AdaMerging(loss="expert_kl"),
    "AdaMerging on TSV-M": AdaMerging(start=TSVMerge(), loss="expert_kl"),
}
"""All but Slerp, which takes two experts. Hyper-parameters are the defaults."""

RECIPES = {
    "paper": CorrectionOptions.paper(),
    "representation": CorrectionOptions(metric="representation"),
    "default": CorrectionOptions(),
}
PREFERENCES = ("equal", "priority", "one-hot")
EXPECTED = ("average", "task arithmetic", "TIES", "AdaMerging", "RegMean++", "TSV-M")
"""Order on published CLIP figures, lowest first; the last two are about equal."""
CLOSE = 0.01


@dataclass
class Row:
    """Figures of one method on one suite, a value a seed."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    problem: str = ""
    """Why there are none."""

    @property
    def uncorrected(self) -> float:
        """Mean normalized accuracy of the merge as it is."""
        return statistics.fmean(self.values["uncorrected"])


def figures(merged: Merge) -> dict[str, float]:
    """Normalized accuracies of one merge, mean over the tasks."""
    tasks = list(merged.test)
    found = {"uncorrected": statistics.fmean(merged.scores(None, None).values())}
    equal = dict.fromkeys(tasks, 1 / len(tasks))
    for recipe, options in RECIPES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            correction = merged.correction(options)
            for name in PREFERENCES:
                scores = merged.scores(correction, equal if name == "equal" else name)
                found[f"{recipe}, {name}"] = statistics.fmean(scores.values())
    return found


def measure(experts: Experts, names: list[str], rows: dict[str, Row]) -> None:
    """Add the figures of one seed to the rows."""
    known = references(experts)
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state, seconds, memory = spent(lambda n=name: backbone(experts, METHODS[n]))
        except ValueError as error:  # a method that these experts are not for says so
            rows[name].problem = str(error)
            print(f"{name}: {error}", flush=True)
            continue
        found = figures(merge(experts, METHODS[name], known, state=state))
        for key, value in (*found.items(), ("seconds", seconds), ("MiB", memory)):
            rows[name].values[key].append(value)
        print(f"{name:26} {found['uncorrected']:.3f} {seconds:8.1f} s", flush=True)


def main(
    suites: list[str] = ["glyphs-convnext", "glyphs-vit"],  # noqa: B006
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    methods: list[str] = list(METHODS),  # noqa: B006
    root: str = str(ROOT),
    output: str = "data_methods",
) -> None:
    """Write docs/results/data_methods.md, anew after every seed.

    Args:
        suites: Which suites.
        seeds: Which seeds.
        methods: Which methods, by the names in the table.
        root: Where the experts are, or will be.
        output: Another name of the file, without its ending.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise SystemExit(f"unknown methods {unknown}; there are: {', '.join(METHODS)}.")
    torch.set_num_threads(1)
    found: dict[str, dict[str, Row]] = {}
    for suite in suites:
        rows = found[suite] = {name: Row() for name in methods}
        for seed in seeds:
            print(f"{suite}, seed {seed}", flush=True)
            measure(build(suite, seed, Path(root)), methods, rows)
            _write(found, seeds, output)


def _write(found: dict[str, dict[str, Row]], seeds: list[int], output: str) -> None:
    sections = [
        "Normalized accuracy (merge over expert, mean over tasks), mean ± standard deviation over "
        "the seeds. `paper` is the correction's published recipe, `representation` chooses ridge "
        "and prior by cross-validation, `default` does so in the metric of the heads where they "
        "have room; each under equal preference, with half of the weight on the task measured "
        "(priority), and all of it (one-hot). Seconds are CPU time of the merge alone on one "
        "thread, MiB the growth of the process's memory in it. Methods have their default "
        "hyper-parameters; those that look at data see the pool's unlabeled calibration inputs, "
        "apart from the test inputs (inductive). "
        "Slerp takes two experts and is left out.",
    ]
    for suite, rows in found.items():
        keys = ["uncorrected", *(f"{r}, {p}" for r in RECIPES for p in PREFERENCES)]
        cells = [
            [
                name,
                *(mean_and_spread(row.values[key]) for key in keys),
                mean_and_spread(row.values["seconds"], 1),
                mean_and_spread(row.values["MiB"], 0),
            ]
            for name, row in rows.items()
            if row.values
        ]
        sections += [f"## {suite}", table(["method", *keys, "seconds", "MiB"], cells)]
        sections += [
            f"{name} is not for these experts: {row.problem}"
            for name, row in rows.items()
            if row.problem
        ]
        sections.append(order(rows))
    write("data_methods", "Methods on trained experts", seeds, sections, output)


def order(rows: dict[str, Row]) -> str:
    """How the uncorrected merges are ordered, beside the order on published figures."""
    there = [name for name in EXPECTED if name in rows and rows[name].values]
    ours = sorted(there, key=lambda name: rows[name].uncorrected)
    lines = [
        "Order expected from published CLIP figures, uncorrected: average < task arithmetic < TIES "
        "< AdaMerging < RegMean++, about TSV-M. Here: "
        + " < ".join(f"{name} ({rows[name].uncorrected:.3f})" for name in ours)
        + "."
    ]
    for position, low in enumerate(there):
        for high in there[position + 1 :]:
            gap = rows[low].uncorrected - rows[high].uncorrected
            alike = {low, high} == {"RegMean++", "TSV-M"}
            if alike and abs(gap) > CLOSE:
                lines.append(
                    f"- {low} and {high} should be about equal; they are {-gap:+.3f} apart."
                )
            elif not alike and gap > CLOSE:
                lines.append(f"- Differs: {low} is above {high} by {gap:.3f}.")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
