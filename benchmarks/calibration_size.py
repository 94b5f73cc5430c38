"""Is the correction ever worse than none? By the number of calibration samples.

``python -m benchmarks.calibration_size [--suites NAME ...] [--seeds N ...]``
"""

import statistics
import warnings
from collections import defaultdict

import torch
from jsonargparse import auto_cli

from benchmarks.features import Merge, merge, references
from benchmarks.results import mean_and_spread, table, write
from benchmarks.suites import SUITES, Experts, build
from lightning_merge.correction import CorrectionOptions
from lightning_merge.correction.validation import warn_of_harm
from lightning_merge.methods import Average

RECIPES = {
    "paper": CorrectionOptions.paper(),
    "representation": CorrectionOptions(metric="representation"),
    "default": CorrectionOptions(),
}
SIZES = ("1 a class", "2 a class", "5 a class", "10 %", "100 %")
Gains = dict[tuple[str, str, str], list[float]]
"""By size, recipe and preference: normalized accuracies, one a seed."""


def sizes_of(experts: Experts, size: str) -> dict[str, int]:
    """Samples of every task; drawn without looking at labels."""
    number = float(size.split()[0])
    return {
        task: min(len(data.calibration), max(2, round(number * data.classes)))
        if "class" in size
        else max(2, round(number / 100 * len(data.calibration)))
        for task, data in experts.tasks.items()
    }


def measure(experts: Experts, merged: Merge) -> tuple[float, Gains, Gains]:
    """Normalized accuracy of the uncorrected merge, and of every recipe at every size.

    The last part says whether the library warned: 1, or 0.
    """
    tasks = list(experts.tasks)
    equal = dict.fromkeys(tasks, 1 / len(tasks))
    plain = statistics.fmean(merged.scores(None, None).values())
    found: Gains = defaultdict(list)
    warned: Gains = defaultdict(list)
    for size in SIZES:
        for recipe, options in RECIPES.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                correction = merged.correction(options, sizes_of(experts, size))
                harmful = warn_of_harm(correction, merged.heads)
                for name, preference in (("equal", equal), ("one_hot", "one-hot")):
                    values = merged.scores(correction, preference).values()
                    found[size, recipe, name].append(statistics.fmean(values))
                    warned[size, recipe, name].append(float(bool({name, "unknown"} & {*harmful})))
    return plain, found, warned


def main(
    suites: list[str] = list(SUITES),  # noqa: B006
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    output: str = "calibration_size",
) -> None:
    """Write docs/results/calibration_size.md.

    Args:
        suites: Which suites.
        seeds: Which seeds.
        output: Another name of the file, without its ending, for some of the suites.
    """
    torch.set_num_threads(1)
    sections = [
        "Normalized accuracy (merge over expert, mean over tasks) of the average merge, corrected "
        "on ever more calibration samples; mean ± standard deviation over the seeds. Bold: below "
        "the uncorrected merge by more than the deviation of the difference and 0.005. An "
        "exclamation mark for every seed at which the library warns of harm, or that it cannot "
        "tell. `paper` is the published recipe, `representation` chooses ridge and prior by "
        "cross-validation, `default` does so in the metric of the heads."
    ]
    for suite in suites:
        plain: list[float] = []
        found: Gains = defaultdict(list)
        warned: Gains = defaultdict(list)
        for seed in seeds:
            experts = build(suite, seed)
            merged = merge(experts, Average(), references(experts))
            value, gains, harm = measure(experts, merged)
            plain.append(value)
            for key, values in gains.items():
                found[key] += values
                warned[key] += harm[key]
            print(suite, seed, f"uncorrected {value:.3f}", flush=True)
        sections += [
            f"## {suite}",
            f"Uncorrected: {mean_and_spread(plain)}.",
            _table(plain, found, warned),
        ]
        print("\n".join(sections[-2:]), flush=True)
        write("calibration_size", "Calibration size", seeds, sections, output)


def _table(plain: list[float], found: Gains, warned: Gains) -> str:
    columns = [(recipe, name) for name in ("equal", "one_hot") for recipe in RECIPES]
    rows = [
        [size, *(_cell(found[(size, *c)], plain, warned[(size, *c)]) for c in columns)]
        for size in SIZES
    ]
    return table(["calibration", *(f"{recipe}, {name}" for recipe, name in columns)], rows)


def _cell(values: list[float], plain: list[float], warned: list[float]) -> str:
    gains = [value - other for value, other in zip(values, plain, strict=True)]
    noise = statistics.stdev(gains) if len(gains) > 1 else 0.0
    shown = mean_and_spread(values) + "!" * int(sum(warned))
    return f"**{shown}**" if statistics.fmean(gains) < -max(noise, 0.005) else shown


if __name__ == "__main__":
    auto_cli(main)
