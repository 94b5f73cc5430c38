"""Two tasks at equal preference, calibrated on 2,000 and on 100 samples.

``python -m benchmarks.unequal_sizes [--seeds N ...]``
"""

import statistics

import torch
from jsonargparse import auto_cli

from benchmarks.features import merge, references
from benchmarks.results import mean_and_spread, table, write
from benchmarks.suites import build
from lightning_merge.correction import CorrectionOptions
from lightning_merge.methods import Average

RECIPES = {
    "paper (raw sums)": CorrectionOptions.paper(),
    "paper, per sample": CorrectionOptions(
        beta=0.1,
        beta_mode="absolute",
        prior="svd",
        task_scale="per_sample",
        metric="representation",
    ),
    "paper, per energy": CorrectionOptions(
        beta=0.1,
        beta_mode="absolute",
        prior="svd",
        task_scale="per_energy",
        metric="representation",
    ),
    "representation": CorrectionOptions(metric="representation"),
    "default": CorrectionOptions(),
}


def main(suite: str = "glyphs-convnext", seeds: list[int] = [0, 1, 2]) -> None:  # noqa: B006
    """Write docs/results/unequal_sizes.md.

    Args:
        suite: Its first two tasks are taken.
        seeds: Which seeds.
    """
    torch.set_num_threads(1)
    found: dict[tuple[str, str], list[list[float]]] = {}
    pair: list[str] = []
    for seed in seeds:
        experts = build(suite, seed)
        pair = list(experts.tasks)[:2]
        merged = merge(experts, Average(), references(experts), tasks=pair)
        for label, sizes in {
            "2,000 and 2,000": dict.fromkeys(pair, 2000),
            "2,000 and 100": dict(zip(pair, (2000, 100), strict=True)),
            "100 and 2,000": dict(zip(pair, (100, 2000), strict=True)),
        }.items():
            for recipe, options in RECIPES.items():
                correction = merged.correction(options, sizes)
                scores = merged.scores(correction, dict.fromkeys(pair, 0.5))
                found.setdefault((label, recipe), []).append([scores[task] for task in pair])
    rows = []
    for (label, recipe), values in found.items():
        gaps = [abs(a - b) for a, b in values]
        by_task = [mean_and_spread(list(column)) for column in zip(*values, strict=True)]
        rows.append([label, recipe, *by_task, f"{statistics.fmean(gaps):.3f}"])
    text = table(["calibration", "recipe", *pair, "difference"], rows)
    print(text)
    write(
        "unequal_sizes",
        "Unequal calibration sizes",
        seeds,
        [
            f"Normalized accuracy at equal preference, average merge of the first two experts of "
            f"{suite}. Raw sums give the task with more samples more say; scaled losses do not.",
            text,
        ],
    )


if __name__ == "__main__":
    auto_cli(main)
