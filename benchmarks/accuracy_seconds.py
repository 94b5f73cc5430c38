"""Accuracy at equal preference against the seconds of a merge: learned and closed-form ways.

``python -m benchmarks.accuracy_seconds [--suites NAME ...] [--seeds N ...] [--steps N ...]``
"""

import statistics
import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.features import backbone, merge, references
from benchmarks.results import mean_and_spread, run, spent, table, write
from benchmarks.suites import ROOT, Experts, build
from lightning_merge.correction import CorrectionOptions
from lightning_merge.methods import (
    AdaMerging,
    Average,
    MergeMethod,
    OutputProjection,
    RegMean,
    TSVMerge,
)
from lightning_merge.report.pictures import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    SMALL,
    TEXT,
    new_figure,
    tidy,
)
from lightning_merge.selecting import select_merge

PICTURES = Path("docs/pictures")
WEIGHTS_ALONE: dict[str, MergeMethod] = {"average": Average(), "TSV-M": TSVMerge()}
CLOSED_FORM: dict[str, RegMean | OutputProjection] = {
    "RegMean": RegMean(),
    "RegMean++": RegMean(inputs="merged"),
    "projection, task_global": OutputProjection(basis="task_global", mode="parallel"),
    "projection, task": OutputProjection(basis="task"),
    "projection, full": OutputProjection(),
}
SELECTED = "selection without labels"
NUMBERED = ("AdaMerging", "RegMean++", "projection, full")
"""Their points bear the number of steps or inputs."""
LOSSES = {"AdaMerging": "entropy", "AdaMerging, expert_kl": "expert_kl"}
STYLES = {
    "average": ("o", MUTED),
    "TSV-M": ("s", PURPLE),
    "RegMean": ("v", SKY),
    "RegMean++": ("^", BLUE),
    "projection, task_global": ("P", "#8A6D00"),
    "projection, task": ("X", ORANGE),
    "projection, full": ("p", INK),
    SELECTED: ("D", INK),
    "AdaMerging": ("o", RED),
    "AdaMerging, expert_kl": ("o", GREEN),
}
Trial = tuple[str, str]
"""A method, and its steps or its inputs of a task: ``10 steps``, ``256 inputs``, ``all inputs``."""
Figures = dict[Trial, dict[str, list[float]]]
"""Seconds, and accuracies without and with the default correction."""


def measure(experts: Experts, steps: list[int], samples: list[int], found: Figures) -> None:
    """Add the figures of one seed."""
    known = references(experts)
    trials: dict[Trial, MergeMethod] = {(name, ""): m for name, m in WEIGHTS_ALONE.items()}
    for name, method in CLOSED_FORM.items():
        for number in samples:
            trials[name, f"{number} inputs"] = replace(method, samples=number)
        trials[name, "all inputs"] = method
    for name, loss in LOSSES.items():
        for number in steps:
            method = AdaMerging(steps=number, loss=loss, patience=None)  # type: ignore[arg-type]
            trials[name, f"{number} steps"] = method
    for key, method in trials.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state, seconds, _ = spent(lambda m=method: backbone(experts, m))
            merged = merge(experts, method, known, state=state)
            equal = dict.fromkeys(merged.test, 1 / len(merged.test))
            correction = merged.correction(CorrectionOptions())
            values = (
                seconds,
                statistics.fmean(merged.scores(None, None).values()),
                statistics.fmean(merged.scores(correction, equal).values()),
            )
        _add(found, key, values)
    _add(found, (SELECTED, ""), selected(experts))


def selected(experts: Experts) -> tuple[float, float, float]:
    """What selection without labels gives: all candidates are merged, and its own correction."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen, seconds, _ = spent(
            lambda: select_merge(experts.pool, module=experts.template, batch_size=250)
        )
    model = chosen.model
    equal = dict.fromkeys(model.tasks, 1 / len(model.tasks))
    known = references(experts)
    scores: list[list[float]] = [[], []]
    with torch.inference_mode():
        for task, data in experts.tasks.items():
            inputs, labels = data.test
            networks = model.uncorrected(task), model.with_preference(equal, task)
            for row, network in zip(scores, networks, strict=True):
                logits = torch.cat([network(part) for part in inputs.split(250)])
                accuracy = float((logits.argmax(1) == labels).double().mean())
                row.append(accuracy / known.accuracy[task])
    return seconds, statistics.fmean(scores[0]), statistics.fmean(scores[1])


def _add(found: Figures, key: Trial, values: tuple[float, float, float]) -> None:
    for name, value in zip(("seconds", "uncorrected", "corrected"), values, strict=True):
        found[key][name].append(value)
    print(key, [round(value, 3) for value in values], flush=True)


def draw(found: dict[str, Figures], path: Path) -> None:
    """One panel a suite and row: accuracy over seconds, logarithmic."""
    figure = new_figure(5.2 * len(found), 6.6)
    axes = figure.subplots(2, len(found), squeeze=False, sharex="col")
    for column, (suite, figures) in enumerate(found.items()):
        for row, kind in enumerate(("uncorrected", "corrected")):
            panel = axes[row, column]
            tidy(panel)
            for name, (marker, colour) in STYLES.items():
                points = [
                    (statistics.fmean(v["seconds"]), statistics.fmean(v[kind]), setting)
                    for (method, setting), v in figures.items()
                    if method == name
                ]
                if not points:
                    continue
                x, y, settings = zip(*points, strict=True)
                line = "-" if len(points) > 1 else "none"
                panel.plot(
                    x, y, marker=marker, color=colour, linestyle=line, label=name, markersize=7,
                    markeredgecolor="white", linewidth=1.2,
                )  # fmt: skip
                for a, b, setting in zip(x, y, settings, strict=True):
                    if name in NUMBERED:
                        panel.annotate(
                            setting.split(" ")[0], (a, b), (0, -11), textcoords="offset points",
                            ha="center", fontsize=SMALL - 1, color=MUTED,
                        )  # fmt: skip
            panel.set_xscale("log")
            panel.set_title(f"{suite}, {kind}", fontsize=TEXT, loc="left", color=INK)
            panel.set_ylabel("normalized accuracy, equal preference", fontsize=SMALL)
            if row == 1:
                panel.set_xlabel(
                    "CPU seconds of the merge (numbers: steps, inputs)", fontsize=SMALL
                )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=SMALL
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(
    suites: list[str] = ["glyphs-convnext", "glyphs-vit"],  # noqa: B006
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    steps: list[int] = [10, 30, 100, 300],  # noqa: B006
    samples: list[int] = [256],  # noqa: B006
    root: str = str(ROOT),
    output: str = "accuracy_seconds",
) -> None:
    """Write docs/results/accuracy_seconds.md and docs/pictures/accuracy_seconds.png.

    Args:
        suites: Which suites.
        seeds: Which seeds.
        steps: Numbers of steps of AdaMerging.
        samples: Numbers of inputs of a task for the closed-form ways, besides all there are.
        root: Where the experts are, or will be.
        output: Another name of both files, without their endings.
    """
    torch.set_num_threads(1)
    found: dict[str, Figures] = {}
    for suite in suites:
        found[suite] = defaultdict(lambda: defaultdict(list))
        for seed in seeds:
            print(f"{suite}, seed {seed}", flush=True)
            measure(build(suite, seed, Path(root)), steps, samples, found[suite])
            draw(found, PICTURES / f"{output}.png")
            _write(found, seeds, output)


def _write(found: dict[str, Figures], seeds: list[int], output: str) -> None:
    sections = [
        "Normalized accuracy (merge over expert, mean over tasks) at equal preference, without "
        "correction and with the default one, and CPU seconds of the merge on one thread (of the "
        "selection: of all candidates, their passes over the calibration inputs included; its "
        "correction is the one it chose). Mean ± standard deviation over the seeds. AdaMerging's "
        "steps are of 16 samples a task; all inputs are those of the pool, up to 2,000 a task. The "
        "share is of the seconds of the longest AdaMerging.",
        f"![Accuracy against seconds](../pictures/{output}.png)",
    ]
    for suite, figures in found.items():
        longest = max(
            statistics.fmean(v["seconds"]) for (name, _), v in figures.items() if name in LOSSES
        )
        rows = [
            [
                ", ".join(filter(None, trial)),
                mean_and_spread(v["uncorrected"]),
                mean_and_spread(v["corrected"]),
                mean_and_spread(v["seconds"], 2),
                f"{100 * statistics.fmean(v['seconds']) / longest:.1f} %",
            ]
            for trial, v in figures.items()
        ]
        header = ["method", "uncorrected", "corrected", "seconds", "share"]
        sections += [f"## {suite}", table(header, rows)]
    write("accuracy_seconds", "Accuracy against seconds", seeds, sections, output)


if __name__ == "__main__":
    run(main)
