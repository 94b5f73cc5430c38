"""What the correction costs: calibration, queries, a search, sweeps and memory.

``python -m benchmarks.correction_cost [--parts NAME ...] [--threads N] [--output NAME]``

Some minutes on two cores. What is compared runs in turns within one run, so that whatever else the
machine does hits both alike; medians of wall-clock times are given, and ratios are medians of the
ratios of single rounds. A fastest round far below the median says that the machine was busy.
"""

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import timm
import torch
from jsonargparse import auto_cli
from torch import nn

from benchmarks.results import table, write
from benchmarks.test_bench_correction import CLASSES, heads, lattice, ready, tasks
from lightning_merge import MergedModel, merge_experts
from lightning_merge.correction import ClosedFormCorrection, CorrectionOptions, CorrectionStatistics
from lightning_merge.evaluation import evaluate, sweep_task
from lightning_merge.runtime import Runtime

POINTS = 120
"""Preferences of a lattice."""


def rounds_of(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in every round, one after the other, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def in_turns(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, measured in turns."""
    return {name: statistics.median(found) for name, found in rounds_of(runs, rounds).items()}


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median of the ratios of single rounds."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def gemm_rate() -> float:
    """Float64 GFLOP/s of a product of 1024 x 1024 matrices: what bounds every query."""
    A = torch.randn(1024, 1024, dtype=torch.float64)
    return 2 * 1024**3 / in_turns({"product": lambda: A @ A}, 7)["product"] / 1e9


def vit(classes: int) -> nn.Module:
    return timm.create_model("vit_base_patch32_clip_224", num_classes=classes).eval()


def calibration(rounds: int = 3, updates: int = 4) -> list[str]:
    """Cost of the statistics beside the two forward passes that feed them."""
    network = vit(0)
    images = torch.randn(32, 3, 224, 224)
    with torch.inference_mode():
        features = network(images)
    widths = (512, features.shape[1])

    def passes() -> None:
        with torch.inference_mode():
            network(images)
            network(images)

    def updating(width: int) -> Callable[[], None]:
        merged, expert = features[:, :width].clone(), features[:, :width].roll(1).clone()
        sums = CorrectionStatistics(width, width)

        def update() -> None:
            for _ in range(updates):
                sums.update(merged, expert)

        return update

    runs: dict[str, Callable[[], object]] = {"passes": passes}
    found = rounds_of(runs | {f"{width}": updating(width) for width in widths}, rounds)
    middle = {name: 1e3 * statistics.median(values) for name, values in found.items()}
    rows = []
    for width in map(str, widths):
        share = 100 * ratio(found[width], found["passes"]) / updates
        each = middle[width] / updates
        rows.append([width, f"{middle['passes']:.0f} ms", f"{each:.1f} ms", f"{share:.2f} %"])
    return [
        "## Calibration",
        "A batch of 32 images of 224 x 224 through two ViT-B/32, and its statistics in five folds.",
        table(["features", "two forward passes", "statistics", "on top"], rows),
    ]


def queries(rounds: int = 9) -> list[str]:
    """Times of one query by tasks and by classes, and of a lattice."""
    runs: dict[str, Callable[[], object]] = {}
    for count in (2, 4, 8, 16, 32, 64):
        p = lattice(count, 1)[0]
        runs[f"map, {count} tasks"] = lambda c=count, p=p: ready(c).solve(p)
    p = lattice(8, 1)[0]
    few = heads(8, classes=(10, 20, 43, 45, 47, 60, 80, 100))
    served = ClosedFormCorrection(tasks(8), metric="head", heads=few, beta=1e-2, prior="procrustes")
    for classes in sorted({*CLASSES, 400}):
        head = torch.randn(classes, 512, generator=torch.Generator().manual_seed(classes))
        runs[f"folded head, 8 tasks, {classes} classes"] = lambda H=head: ready().fold(
            p, "t0", H, None
        )
    for task, (head, _) in few.items():
        runs[f"folded head, head metric, {len(head)} classes"] = lambda t=task, H=head: served.fold(
            p, t, H, None
        )
    for run in runs.values():  # what is kept from query to query
        for _ in range(4):
            run()
    found = rounds_of(runs, rounds)
    P, all_heads = lattice(8, POINTS), heads(8)
    many = {
        f"{POINTS} preferences, one head of 43": lambda: ready().fold(P, "t2", *all_heads["t2"]),
        f"{POINTS} preferences, eight heads, {sum(CLASSES)} rows": lambda: list(
            ready().fold_heads(P, all_heads)
        ),
        f"{POINTS} preferences, eight heads, head metric": lambda: list(served.fold_heads(P, few)),
    }
    found |= rounds_of(many, 3)
    return [
        "## Queries",
        "d = k = 512, float64, eight tasks unless said. A product of large float64 matrices "
        f"reaches {gemm_rate():.0f} GFLOP/s here; eight heads of {sum(CLASSES)} rows under "
        f"{POINTS} preferences take {POINTS * 2 * sum(CLASSES) * 512**2 / 1e9:.0f} GFLOP of "
        "substitutions at least. The head metric is that of independent heads (405 rows).",
        table(
            ["query", "median", "fastest"],
            [
                [name, f"{1e3 * statistics.median(each):.1f} ms", f"{1e3 * min(each):.1f} ms"]
                for name, each in found.items()
            ],
        ),
    ]


def small_model(classes: int, width: int, depth: int, count: int, size: int) -> MergedModel:
    """A merge of ``count`` random vision transformers on images of ``size`` pixels."""

    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return timm.create_model(
            "vit_tiny_patch16_224",
            img_size=size,
            patch_size=8,
            embed_dim=width,
            depth=depth,
            num_heads=width // 64,
            num_classes=classes,
        ).eval()

    inputs = {f"t{t}": torch.randn(64, 3, size, size) for t in range(count)}
    return merge_experts(
        {f"t{t}": made(t) for t in range(count)},
        calibration=inputs,
        base=made(99),
        head="head",
        correction=CorrectionOptions(beta=1e-2, prior="procrustes"),
        check=False,
        report="off",
    )


def search(rounds: int = 1) -> list[str]:
    """The automatic search of one task."""
    sums = {"t0": tasks(8)["t0"]}
    head = {"t0": heads(8)["t2"]}
    found = in_turns(
        {
            "representation": lambda: ClosedFormCorrection(sums).choices(),
            "head, 43 classes": lambda: ClosedFormCorrection(
                sums, metric="head", heads=head
            ).choices(),
        },
        rounds,
    )
    return [
        "## Search",
        "Prior and ridge of one task chosen by five folds, d = k = 512: 30 singular value "
        "decompositions, 65 curves of 81 ridges. It is done once; choices are saved with a merge.",
        table(["metric", "median"], [[name, f"{value:.1f} s"] for name, value in found.items()]),
    ]


SWEPT = ((10, 192, 4, 32, 512), (10, 384, 6, 64, 128), (100, 384, 6, 64, 128))
"""Classes, width, layers, pixels and images a task of the networks that are swept."""


def sweeps(rounds: int = 3, batch: int = 64) -> list[str]:
    """A sweep of all tasks against one plain evaluation of the merged model on the same sets."""
    rows = []
    for classes, width, depth, size, samples in SWEPT:
        model = small_model(classes, width, depth, 3, size)
        P = lattice(3, POINTS)
        images = torch.randn(samples, 3, size, size).split(batch)
        batches = [(x, torch.randint(classes, (len(x),))) for x in images]
        folded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def plain(model=model, batches=batches) -> None:
            for task in model.tasks:
                evaluate(model.uncorrected(task), batches, Runtime(), task)

        def solve(model=model, P=P, folded=folded) -> None:
            chunks = list(model.correction.fold_heads(P, model.linear_heads()))
            for task in model.tasks:
                weights, biases = zip(*(chunk[task] for chunk in chunks), strict=True)
                folded[task] = torch.cat(weights), torch.cat(biases)

        def passes(model=model, batches=batches, P=P, folded=folded) -> None:
            for task in model.tasks:
                sweep_task(model, task, P, batches, Runtime(), folded=folded[task])

        found = rounds_of({"plain": plain, "solve": solve, "passes": passes}, rounds)
        both = [a + b for a, b in zip(found["solve"], found["passes"], strict=True)]
        # Solving does not grow with the test sets: what it adds to larger ones is known.
        larger = ratio(found["passes"], found["plain"]) + ratio(found["solve"], found["plain"]) / (
            2000 / samples
        )
        middle = {name: statistics.median(values) for name, values in found.items()}
        parameters = sum(p.numel() for p in model.network.parameters())
        rows.append(
            [
                f"{depth} layers of {width}, {size} pixels, {parameters / 1e6:.1f} M",
                classes,
                samples,
                f"{1e3 * middle['plain'] / samples / len(model.tasks):.2f} ms",
                f"{middle['plain']:.2f} s",
                f"{middle['solve']:.2f} s",
                f"{middle['passes']:.2f} s",
                f"{ratio(both, found['plain']):.2f}",
                f"{larger:.2f}",
            ]
        )
    return [
        "## Sweeps",
        f"{POINTS} preferences of three tasks, against one plain evaluation of the merged model on "
        f"the same test sets. The sweep adds {POINTS} K d multiplications an image, and the "
        "solving of all preferences, which does not grow with the test sets. The last column is "
        "the ratio for 2,000 images a task, from the same times.",
        table(
            [
                "network",
                "classes",
                "images a task",
                "one image",
                "plain",
                "solving",
                "passes",
                "ratio",
                "ratio at 2,000",
            ],
            rows,
        ),
    ]


def peak(samples: int, points: int, d: int = 256) -> float:
    """Peak memory in MB of this process after calibration and a sweep of preferences."""
    sums = {f"t{t}": CorrectionStatistics(d, d) for t in range(4)}
    head = torch.randn(20, d), None
    for start in range(0, samples, 256):
        for number, found in enumerate(sums.values()):
            rows = torch.randn(256, d, generator=torch.Generator().manual_seed(start + number))
            found.update(rows, rows + 0.1 * rows.roll(1, 1))
    correction = ClosedFormCorrection(sums, beta=1e-2, prior="procrustes", memory_cap=64 * 2**20)
    for part in correction.fold_heads(lattice(4, points), dict.fromkeys(sums, head)):
        assert len(part) == 4
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory() -> list[str]:
    """Peaks of fresh processes."""
    rows = []
    for samples, points in ((1024, 128), (32768, 128), (1024, 2048)):
        code = f"from benchmarks.correction_cost import peak; print(peak({samples}, {points}))"
        found = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        rows.append([f"{samples:,}", f"{points:,}", f"{float(found.stdout):.0f} MB"])
    return [
        "## Memory",
        "Peak of a fresh process: four tasks of 256 features, heads of 20 classes, a `memory_cap` "
        "of 64 MB; Python and torch included.",
        table(["samples a task", "preferences", "peak"], rows),
    ]


def main(
    parts: Sequence[str] = ("calibration", "queries", "search", "sweeps", "memory"),
    threads: int = 2,
    output: str = "correction_cost",
) -> None:
    """Write docs/results/correction_cost.md.

    Args:
        parts: What to measure; all by default.
        threads: Threads of torch.
        output: Another name of the file, without its ending.
    """
    torch.set_num_threads(threads)
    known = {
        "calibration": calibration,
        "queries": queries,
        "search": search,
        "sweeps": sweeps,
        "memory": memory,
    }
    if unknown := [part for part in parts if part not in known]:
        raise ValueError(f"unknown parts {unknown}; known: {list(known)}.")
    waiting = os.getloadavg()[0]
    load = f"Load of the machine at the start: {waiting:.1f} on {os.cpu_count()} processors."
    sections = [load]
    for part in parts:
        start = time.perf_counter()
        sections += known[part]()
        print("\n\n".join(sections[-3:]), flush=True)
        print(f"{part}: {time.perf_counter() - start:.0f} s\n", flush=True)
        write("correction_cost", "Cost of the correction", [], sections, output)


if __name__ == "__main__":
    auto_cli(main)
