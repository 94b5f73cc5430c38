"""Every method on experts that were trained: uncorrected, and under three corrections.

``python -m benchmarks.methods_table [--suites NAME ...] [--seeds N ...] [--methods NAME ...]``

Every figure is kept beside the experts as soon as it is measured (``ROOT/methods_table``), so the
command continues where it was stopped, and suites may be measured side by side; a method whose
hyper-parameters have changed is measured again.
"""

import json
import re
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.features import Merge, References, backbone, merge, references
from benchmarks.results import mean_and_spread, run, spent, table, write
from benchmarks.suites import ROOT, Experts, build
from lightning_merge.correction import CorrectionOptions
from lightning_merge.files import write_json
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
    Slerp,
    TaskArithmetic,
    TSVMerge,
)

PAGES = Path("docs/methods")
BEGIN, END = "<!-- numbers: benchmarks/methods_table.py -->", "<!-- end of numbers -->"


@dataclass(frozen=True)
class Row:
    """A method of the table, with its default hyper-parameters where nothing is said."""

    method: MergeMethod
    page: str | None = None
    """Page of docs/methods that shows its numbers."""
    tasks: int | None = None
    """How many tasks it merges, the first ones; all by default."""


METHODS: dict[str, Row] = {
    "base": Row(TaskArithmetic(scale=0.0)),
    "average": Row(Average(), "average"),
    "task arithmetic": Row(TaskArithmetic(), "task_arithmetic"),
    "TIES": Row(TIES(), "ties"),
    "DARE": Row(DARE(), "dare"),
    "DARE-TIES": Row(DARE(combine="ties", scale=1.0), "dare"),
    "DELLA": Row(DELLA(), "della"),
    "Breadcrumbs": Row(Breadcrumbs(), "breadcrumbs"),
    "Model Stock": Row(ModelStock(), "model_stock"),
    "Consensus": Row(Consensus(), "consensus"),
    "average of two": Row(Average(), "slerp", tasks=2),
    "Slerp of two": Row(Slerp(), "slerp", tasks=2),
    "TSV-M": Row(TSVMerge(), "tsv"),
    "Iso-C": Row(IsoC(), "isotropic"),
    "Iso-CTS": Row(IsoCTS(), "isotropic"),
    "Fisher": Row(Fisher(), "fisher"),
    "greedy soup": Row(GreedySoup(), "greedy_soup"),
    "RegMean": Row(RegMean(), "regmean"),
    "RegMean++": Row(RegMean(inputs="merged"), "regmean"),
    "projection, task_global": Row(
        OutputProjection(basis="task_global", mode="parallel"), "output_projection"
    ),
    "projection, task": Row(OutputProjection(basis="task"), "output_projection"),
    "projection, row": Row(OutputProjection(basis="row"), "output_projection"),
    "projection, full": Row(OutputProjection(basis="full"), "output_projection"),
    "AdaMerging, task-wise": Row(AdaMerging(granularity="task"), "adamerging"),
    "AdaMerging": Row(AdaMerging(), "adamerging"),
    "AdaMerging++": Row(AdaMerging(vectors="ties"), "adamerging"),
    "AdaMerging, expert_kl": Row(AdaMerging(loss="expert_kl"), "adamerging"),
    "AdaMerging on TSV-M": Row(AdaMerging(start=TSVMerge(), loss="expert_kl"), "adamerging"),
}

RECIPES = {
    "paper": CorrectionOptions.paper(),
    "representation": CorrectionOptions(metric="representation"),
    "default": CorrectionOptions(),
}
PREFERENCES = ("equal", "priority", "one-hot")
SHOWN = ("uncorrected", "representation, equal", "default, equal", "default, one-hot")
"""Columns of a method's page."""
EXPECTED = ("average", "task arithmetic", "TIES", "AdaMerging", "RegMean++", "TSV-M")
"""Order on published CLIP figures, lowest first; the last two are about equal."""
CLOSE = 0.01


@dataclass
class Numbers:
    """Figures of one method on one suite, a value a seed."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    problem: str = ""
    """Why there are none."""

    @property
    def seeds(self) -> int:
        """How many there are."""
        return len(self.values.get("uncorrected", ()))

    @property
    def uncorrected(self) -> float:
        """Mean normalized accuracy of the merge as it is."""
        return statistics.fmean(self.values["uncorrected"])


Figures = dict[str, Any]
"""What is kept of one method on one suite and seed: ``values`` by name, or the ``problem``."""
Found = dict[str, dict[str, Numbers]]
"""By suite and method."""


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


def measure(experts: Experts, known: References, row: Row) -> dict[str, float]:
    """Figures of one method on one seed, with CPU seconds and memory of the merge.

    Raises:
        ValueError: If these experts are not for the method.
    """
    tasks = list(experts.tasks)[: row.tasks]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, seconds, memory = spent(lambda: backbone(experts, row.method, tasks))
        found = figures(merge(experts, row.method, known, tasks=tasks, state=state))
    return {**found, "seconds": seconds, "MiB": memory}


def measured(
    experts: Callable[[], Experts], known: Callable[[], References], row: Row, kept: Path
) -> Figures:
    """What :func:`measure` gives, read if it was kept for the very same method, else kept.

    Args:
        experts: Of one suite and seed; asked for only where something is measured.
        known: Their references, likewise.
        row: The method.
        kept: The file.
    """
    if found := read(kept, row):
        return found
    fresh: Figures = {"method": repr(row)}
    try:
        fresh["values"] = measure(experts(), known(), row)
    except ValueError as error:  # a method that these experts are not for says so
        fresh["problem"] = str(error)
    write_json(kept, fresh)
    return fresh


def read(kept: Path, row: Row) -> Figures:
    """What was kept for the very same method; empty if nothing was."""
    if not kept.exists():
        return {}
    found: Figures = json.loads(kept.read_text(encoding="utf-8"))
    return found if found["method"] == repr(row) else {}


def main(
    suites: list[str] = ["glyphs-convnext", "glyphs-vit"],  # noqa: B006
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    methods: list[str] = list(METHODS),  # noqa: B006
    root: str = str(ROOT),
    output: str = "methods",
    pages: bool = True,
    only_kept: bool = False,
) -> None:
    """Write docs/results/methods.md and the numbers of the methods' pages, anew after each seed.

    Args:
        suites: Which suites.
        seeds: Which seeds.
        methods: Which methods, by the names in the table.
        root: Where the experts are, or will be.
        output: Another name of the file, without its ending.
        pages: Whether to write into docs/methods.
        only_kept: Measure nothing: the figures that are there, each with the number of its seeds.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise SystemExit(f"unknown methods {unknown}; there are: {', '.join(METHODS)}.")
    torch.set_num_threads(1)
    found: Found = {}
    for suite in suites:
        rows = found[suite] = {name: Numbers() for name in methods}
        for done, seed in enumerate(seeds, 1):
            folder = Path(root) / "methods_table" / suite / str(seed)
            experts = cache(partial(build, suite, seed, Path(root)))
            known = cache(lambda e=experts: references(e()))
            for name, numbers in rows.items():
                kept = folder / f"{name}.json"
                row = METHODS[name]
                fresh = read(kept, row) if only_kept else measured(experts, known, row, kept)
                if not fresh:
                    continue
                numbers.problem = fresh.get("problem", "")
                for key, value in fresh.get("values", {}).items():
                    numbers.values[key].append(value)
                shown = numbers.problem or f"{fresh['values']['uncorrected']:.3f}"
                print(suite, seed, f"{name:26} {shown}", flush=True)
            write(
                "methods_table", "Methods on trained experts", seeds[:done], sections(found), output
            )
    for page in {METHODS[name].page for name in methods} - {None} if pages else ():
        write_page(PAGES / f"{page}.md", page_numbers(page, found, seeds))


def sections(found: Found) -> list[str]:
    """The text, and a table and the order of the methods for each suite."""
    keys = ["uncorrected", *(f"{r}, {p}" for r in RECIPES for p in PREFERENCES)]
    parts = [
        "Normalized accuracy (merge over expert, mean over tasks), mean ± standard deviation over "
        "the seeds. `paper` is the correction's published recipe, `representation` chooses ridge "
        "and prior by cross-validation, `default` does so in the metric of the heads where they "
        "have room; each under equal preference, with half of the weight on the task measured "
        "(priority), and all of it (one-hot). Seconds are CPU time of the merge alone on one "
        "thread, MiB the growth of the process's memory in it. Methods have their default "
        "hyper-parameters; those that look at data see the pool's unlabeled calibration inputs, "
        "apart from the test inputs (inductive)."
    ]
    for suite, rows in found.items():
        cells = [
            [
                labelled(name, row, rows),
                *(mean_and_spread(row.values[key]) for key in keys),
                mean_and_spread(row.values["seconds"], 1),
                mean_and_spread(row.values["MiB"], 0),
            ]
            for name, row in rows.items()
            if row.values
        ]
        most = max((row.seeds for row in rows.values()), default=0)
        parts += [
            f"## {suite}",
            f"Seeds: {most}, or as many as stand beside a method.",
            table(["method", *keys, "seconds", "MiB"], cells),
        ]
        parts += [
            f"{name} is not for these experts: {row.problem}"
            for name, row in rows.items()
            if row.problem
        ]
        parts.append(order(rows))
    return parts


def labelled(name: str, row: Numbers, rows: dict[str, Numbers]) -> str:
    """The method, with the number of its seeds where others have more."""
    most = max(other.seeds for other in rows.values())
    return name if row.seeds == most else f"{name} ({row.seeds} seed{'s' if row.seeds > 1 else ''})"


def order(rows: dict[str, Numbers]) -> str:
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


def page_numbers(page: str, found: Found, seeds: list[int]) -> str:
    """What a page shows: its methods beside the average, at equal preference and one-hot."""
    lines = []
    for suite, rows in found.items():
        own = [name for name in rows if METHODS[name].page == page]
        for name in dict.fromkeys(own if page == "slerp" else ["average", *own]):
            if name in rows and (values := rows[name].values):
                cells = (mean_and_spread(values[key]) for key in SHOWN)
                lines.append(
                    [
                        suite,
                        labelled(name, rows[name], rows),
                        *cells,
                        mean_and_spread(values["seconds"], 2),
                    ]
                )
    text = (
        "Test accuracy over that of the experts, mean over the tasks, default hyper-parameters, "
        f"seeds {', '.join(map(str, seeds))}; CPU seconds of the merge. "
        "[All methods and preferences](../results/methods.md)."
    )
    return f"{text}\n\n{table(['suite', 'method', *SHOWN, 'seconds'], lines)}"


def write_page(path: Path, text: str) -> None:
    """Put the numbers between the page's two marks."""
    page = path.read_text(encoding="utf-8")
    between = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not between.search(page):
        raise ValueError(f"{path} has no place for its numbers: '{BEGIN}' to '{END}'.")
    path.write_text(between.sub(lambda _: f"{BEGIN}\n{text}\n{END}", page), encoding="utf-8")


if __name__ == "__main__":
    run(main)
