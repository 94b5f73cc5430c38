"""Every merging method, without and with corrections, on small experts: the numbers of the pages.

``python -m benchmarks.methods_table [--suites NAME ...] [--seeds N ...] [--no-pages]``
"""

import argparse
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.features import Merge, References, backbone, merge, references
from benchmarks.results import mean_and_spread, table, write
from benchmarks.suites import SUITES, Experts, build
from lightning_merge.correction import CorrectionOptions
from lightning_merge.methods import (
    DARE,
    DELLA,
    TIES,
    Average,
    Breadcrumbs,
    Consensus,
    IsoC,
    IsoCTS,
    MergeMethod,
    ModelStock,
    Slerp,
    TaskArithmetic,
    TSVMerge,
)

DEFAULT = ("glyphs-convnext", "glyphs-vit")
LIMIT = 500
"""Calibration samples of each task."""
PAGES = Path("docs/methods")
BEGIN, END = "<!-- numbers: benchmarks/methods_table.py -->", "<!-- end of numbers -->"

CORRECTIONS = {
    "paper": CorrectionOptions.paper(),
    "representation": CorrectionOptions(metric="representation"),
    "default": CorrectionOptions(),
}


@dataclass(frozen=True)
class Row:
    """A method of the table."""

    name: str
    make: Callable[[], MergeMethod]
    page: str | None = None
    """Page of docs/methods that shows its numbers."""
    tasks: int | None = None
    """How many tasks it merges, the first ones; all by default."""


ROWS = (
    Row("base (no merge)", lambda: TaskArithmetic(scale=0.0)),
    Row("Average", Average, "average"),
    Row("TaskArithmetic", TaskArithmetic, "task_arithmetic"),
    Row("TIES", TIES, "ties"),
    Row("DARE", DARE, "dare"),
    Row("DARE, ties", lambda: DARE(combine="ties", scale=1.0), "dare"),
    Row("DELLA", DELLA, "della"),
    Row("Breadcrumbs", Breadcrumbs, "breadcrumbs"),
    Row("ModelStock", ModelStock, "model_stock"),
    Row("Consensus", Consensus, "consensus"),
    Row("TSVMerge", TSVMerge, "tsv"),
    Row("IsoC", IsoC, "isotropic"),
    Row("IsoCTS", IsoCTS, "isotropic"),
    Row("Average of two", Average, "slerp", tasks=2),
    Row("Slerp of two", Slerp, "slerp", tasks=2),
)
"""Methods with their defaults. One that needs data is a further row: ``backbone`` knows."""


@dataclass(frozen=True)
class Numbers:
    """What one method is worth on one suite and seed; accuracies over those of the experts."""

    uncorrected: float
    corrected: dict[str, tuple[float, float, float]]
    """By correction: at equal preference, each task under its priority, each under its own."""
    milliseconds: float
    mebibytes: float
    """Resident memory at the highest point of the merge, above that before it."""


def measure(row: Row, experts: Experts, known: References) -> Numbers:
    """Merge once for the clock, once for the accuracies."""
    tasks = list(experts.tasks)[: row.tasks]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, start = _reset_peak(), time.perf_counter()
        backbone(experts, row.make(), tasks, LIMIT)
        seconds, peak = time.perf_counter() - start, _memory("VmHWM")
        merged = merge(experts, row.make(), known, limit=LIMIT, tasks=tasks)
        corrected = {name: _scores(merged, options) for name, options in CORRECTIONS.items()}
    return Numbers(
        uncorrected=statistics.fmean(merged.scores(None, None).values()),
        corrected=corrected,
        milliseconds=1000 * seconds,
        mebibytes=max(0.0, peak - before) / 2**20,
    )


def _scores(merged: Merge, options: CorrectionOptions) -> tuple[float, float, float]:
    tasks, correction = list(merged.test), merged.correction(options)
    equal = dict.fromkeys(tasks, 1 / len(tasks))
    own = {task: _priority(task, tasks) for task in tasks}
    return (
        statistics.fmean(merged.scores(correction, equal).values()),
        statistics.fmean(merged.score(task, correction, own[task]) for task in tasks),
        statistics.fmean(merged.scores(correction, "one-hot").values()),
    )


def _priority(favoured: str, tasks: Sequence[str], weight: float = 0.5) -> dict[str, float]:
    rest = (1 - weight) / (len(tasks) - 1)
    return {task: weight if task == favoured else rest for task in tasks}


def main(suites: Sequence[str], seeds: Sequence[int], pages: bool) -> None:
    """Write docs/results/methods.md and the numbers of the methods' pages.

    Args:
        suites: Which suites.
        seeds: Which seeds.
        pages: Whether to write into docs/methods.
    """
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[Numbers]]] = {}
    for suite in suites:
        found[suite] = {row.name: [] for row in ROWS}
        for seed in seeds:
            experts = build(suite, seed)
            known = references(experts, LIMIT)
            for row in ROWS:
                numbers = measure(row, experts, known)
                found[suite][row.name].append(numbers)
                print(suite, seed, row.name, numbers, flush=True)
    write("methods_table", "Merging methods", seeds, sections(found), output="methods")
    if pages:
        for page in {row.page for row in ROWS if row.page is not None}:
            write_page(PAGES / f"{page}.md", page_numbers(page, found, seeds))


def sections(found: dict[str, dict[str, list[Numbers]]]) -> list[str]:
    """The text and one table for each suite."""
    header = ["method", "uncorrected"]
    kinds = ("equal", "priority", "one-hot")
    header += [f"{name}: {kind}" for name in CORRECTIONS for kind in kinds]
    header += ["ms", "MiB"]
    parts = [
        "Test accuracy over that of the experts, mean over the tasks, mean ± standard deviation "
        f"over the seeds; corrections calibrated on {LIMIT} unlabeled samples a task. `paper` is "
        "the published recipe, `representation` ours in its metric, `default` ours in the metric "
        "of the heads where they have room. "
        "Priority: each task under a weight of one half for itself, the rest shared; one-hot: each "
        "under its own. Methods have their default hyper-parameters. Time and memory are "
        "those of the merge alone, on one thread.",
    ]
    for suite, rows in found.items():
        lines = [[name, *_cells(numbers)] for name, numbers in rows.items()]
        parts += [f"## {suite}", table(header, lines)]
    return parts


def _cells(numbers: list[Numbers]) -> list[str]:
    cells = [mean_and_spread([n.uncorrected for n in numbers])]
    for name in CORRECTIONS:
        cells += [mean_and_spread([n.corrected[name][i] for n in numbers]) for i in range(3)]
    cells.append(f"{statistics.median(n.milliseconds for n in numbers):.0f}")
    cells.append(f"{max(n.mebibytes for n in numbers):.1f}")
    return cells


def page_numbers(
    page: str, found: dict[str, dict[str, list[Numbers]]], seeds: Sequence[int]
) -> str:
    """What a page shows: its methods beside the average, at equal preference and one-hot."""
    header = ["suite", "method", "uncorrected"]
    header += ["representation: equal", "default: equal", "default: one-hot", "ms"]
    lines = []
    for suite, rows in found.items():
        own = [row.name for row in ROWS if row.page == page]
        for name in dict.fromkeys(own if page == "slerp" else ["Average", *own]):
            n = rows[name]
            shown = [
                [x.uncorrected for x in n],
                [x.corrected["representation"][0] for x in n],
                [x.corrected["default"][0] for x in n],
                [x.corrected["default"][2] for x in n],
            ]
            time_of = f"{statistics.median(x.milliseconds for x in n):.0f}"
            lines.append([suite, name, *(mean_and_spread(values) for values in shown), time_of])
    text = (
        "Test accuracy over that of the experts, mean over the tasks, default hyper-parameters, "
        f"seeds {', '.join(map(str, seeds))}; corrections from {LIMIT} unlabeled samples a task. "
        "[All methods and preferences](../results/methods.md)."
    )
    return f"{text}\n\n{table(header, lines)}"


def write_page(path: Path, text: str) -> None:
    """Put the numbers between the page's two marks."""
    page = path.read_text(encoding="utf-8")
    between = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not between.search(page):
        raise ValueError(f"{path} has no place for its numbers: '{BEGIN}' to '{END}'.")
    path.write_text(between.sub(lambda _: f"{BEGIN}\n{text}\n{END}", page), encoding="utf-8")


def _reset_peak() -> float:
    """Start a new peak of the resident memory, where the system can; what there is now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return math.inf  # no peak of its own: none is reported
    return _memory("VmRSS")


def _memory(kind: str) -> float:
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024.0 * int(found[1]) if found else 0.0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(DEFAULT))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--no-pages", dest="pages", action="store_false")
    main(**vars(parser.parse_args()))
