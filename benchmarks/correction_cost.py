"""What the correction costs: calibration, queries, sweeps and memory.

``python -m benchmarks.correction_cost [--threads N] [--output NAME]``

Everything that is compared runs in turns within one run; medians are given, in wall-clock time.
"""

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


def in_turns(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, measured one after the other in every round, once warm."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def gemm_rate() -> float:
    """Float64 GFLOP/s of a product of 1024 x 1024 matrices: what bounds every query."""
    A = torch.randn(1024, 1024, dtype=torch.float64)
    return 2 * 1024**3 / in_turns({"product": lambda: A @ A}, 7)["product"] / 1e9


def vit(classes: int) -> nn.Module:
    return timm.create_model("vit_base_patch32_clip_224", num_classes=classes).eval()


def calibration(rounds: int = 3, batches: int = 4) -> list[str]:
    """Cost of the statistics beside the two forward passes that feed them."""
    network = vit(0)
    images = torch.randn(32, 3, 224, 224)
    with torch.inference_mode():
        features = network(images)
    rows = []
    for width in (512, features.shape[1]):
        merged, expert = features[:, :width].clone(), features[:, :width].roll(1).clone()
        sums = CorrectionStatistics(width, width)

        def passes() -> None:
            with torch.inference_mode():
                for _ in range(2 * batches):
                    network(images)

        def update(sums=sums, merged=merged, expert=expert) -> None:
            for _ in range(batches):
                sums.update(merged, expert)

        found = in_turns({"passes": passes, "update": update}, rounds)
        share = 100 * found["update"] / found["passes"]
        each = [1e3 * found[name] / batches for name in ("passes", "update")]
        rows.append([width, *(f"{value:.0f} ms" for value in each), f"{share:.2f} %"])
    return [
        "## Calibration",
        "A batch of 32 images of 224 x 224 through two ViT-B/32, and its statistics in five folds.",
        table(["features", "two forward passes", "statistics", "on top"], rows),
    ]


def queries(rounds: int = 15) -> list[str]:
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
        for _ in range(8):
            run()
    found = in_turns(runs, rounds)
    P, all_heads = lattice(8, POINTS), heads(8)
    many = {
        f"{POINTS} preferences, one head of 43": lambda: ready().fold(P, "t2", *all_heads["t2"]),
        f"{POINTS} preferences, eight heads, {sum(CLASSES)} rows": lambda: list(
            ready().fold_heads(P, all_heads)
        ),
        f"{POINTS} preferences, eight heads, head metric": lambda: list(served.fold_heads(P, few)),
    }
    found |= in_turns(many, 3)
    return [
        "## Queries",
        "d = k = 512, float64, eight tasks unless said. A product of large float64 matrices "
        f"reaches {gemm_rate():.0f} GFLOP/s here; eight heads of {sum(CLASSES)} rows under "
        f"{POINTS} preferences take {POINTS * 2 * sum(CLASSES) * 512**2 / 1e9:.0f} GFLOP of "
        "substitutions at least. The head metric is that of independent heads (405 rows).",
        table(
            ["query", "median"], [[name, f"{1e3 * value:.1f} ms"] for name, value in found.items()]
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
    )


def sweeps(rounds: int = 3, samples: int = 128, batch: int = 64) -> list[str]:
    """A sweep of all tasks against one plain evaluation of the merged model on the same sets."""
    rows = []
    sizes = ((10, 192, 4, 32), (10, 384, 6, 64), (100, 384, 6, 64), (100, 768, 6, 64))
    for classes, width, depth, size in sizes:
        model = small_model(classes, width, depth, 3, size)
        P = lattice(3, POINTS)
        images = torch.randn(samples, 3, size, size).split(batch)
        batches = [(x, torch.randint(classes, (len(x),))) for x in images]

        def plain(model=model, batches=batches) -> None:
            for task in model.tasks:
                evaluate(model.uncorrected(task), batches, Runtime(), task)

        def sweep(model=model, batches=batches, P=P) -> None:
            chunks = list(model.correction.fold_heads(P, model.linear_heads()))
            for task in model.tasks:
                weights, biases = zip(*(chunk[task] for chunk in chunks), strict=True)
                folded = torch.cat(weights), torch.cat(biases)
                sweep_task(model, task, P, batches, Runtime(), folded=folded)

        found = in_turns({"plain": plain, "sweep": sweep}, rounds)
        parameters = sum(p.numel() for p in model.network.parameters())
        one = found["plain"] / samples / len(model.tasks)
        rows.append(
            [
                f"{depth} layers of {width}, {size} pixels, {parameters / 1e6:.1f} M",
                classes,
                f"{1e3 * one:.2f} ms",
                f"{found['plain']:.2f} s",
                f"{found['sweep']:.2f} s",
                f"{found['sweep'] / found['plain']:.2f}",
            ]
        )
    return [
        "## Sweeps",
        f"{POINTS} preferences of three tasks, {samples} images each, solving included, against "
        f"one plain evaluation of the merged model. The sweep adds {POINTS} K d multiplications an "
        "image and the solving of all preferences, which does not grow with the test sets: where "
        "one image costs the network little, both show.",
        table(["network", "classes", "one image", "plain", "sweep", "ratio"], rows),
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
    for samples, points in ((1024, 128), (32768, 128), (1024, 4096), (32768, 4096)):
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
    parts: Sequence[str] = ("calibration", "queries", "sweeps", "memory"),
    threads: int = 2,
    output: str = "correction_cost",
) -> None:
    """Write docs/results/correction_cost.md.

    Args:
        parts: What to measure.
        threads: Threads of torch.
        output: Another name of the file, without its ending.
    """
    torch.set_num_threads(threads)
    known = {"calibration": calibration, "queries": queries, "sweeps": sweeps, "memory": memory}
    sections: list[str] = []
    for part in parts:
        sections += known[part]()
        print("\n\n".join(sections[-3:]), flush=True)
        write("correction_cost", "Cost of the correction", [0], sections, output)


if __name__ == "__main__":
    auto_cli(main)
