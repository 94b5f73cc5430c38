"""Cost model of every stage, checked at small size: ``python -m benchmarks.scaling``.

Each stage has a count of its work (bytes moved, or floating-point operations at one precision) as
a formula in parameters, tasks, samples, features, classes and preferences. The machine's rate at
that kind of work is measured in the same run by one plain operation; work over rate is the
prediction, and the measured time stands beside it. The same formulas then give 100 tasks and
7 billion parameters on stated rates.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn

from benchmarks.results import table, write
from lightning_merge import merge_experts
from lightning_merge.correction import ClosedFormCorrection, CorrectionStatistics
from lightning_merge.evaluation import sweep_task
from lightning_merge.files import write_tensors
from lightning_merge.methods import Average, TSVMerge
from lightning_merge.pareto import dirichlet
from lightning_merge.runtime import Runtime
from lightning_merge.states import LazyStateDict

ROUNDS = 5


@dataclass(frozen=True)
class Rates:
    """What a device does a second."""

    memory: float
    """Bytes read and written by elementwise work."""
    single: float
    """Floating-point operations of float32 matrix products."""
    double: float
    """The same in float64."""
    disk: float
    """Bytes read."""


@dataclass(frozen=True)
class Size:
    """The quantities that costs depend on."""

    parameters: float = 7e9
    tasks: int = 100
    samples: int = 2000
    """Calibration samples a task."""
    tests: int = 2000
    features: int = 4096
    classes: int = 100
    preferences: int = 200
    forward: float = 0.0
    """Operations of one forward pass of one sample; by default 2 a parameter."""
    devices: int = 1
    width: int = 4096
    """Rows and columns of the typical matrix, for spectral methods."""

    @property
    def per_sample(self) -> float:
        return self.forward or 2 * self.parameters


def average_bytes(s: Size) -> float:
    """Read T experts, write the result."""
    return 4 * s.parameters * (s.tasks + 1)


def spectral_flops(s: Size) -> float:
    """TSV: T Gram matrices and T partial decompositions, then two whitened products, a matrix.

    About ``T (2 w + 10 w + 8 w / T) w^2`` for ``P / w^2`` square matrices of width w.
    """
    return s.parameters * s.width * (12 * s.tasks + 8)


def forward_flops(s: Size) -> float:
    """Calibration: every sample through the merged network and its expert."""
    return 2 * s.tasks * s.samples * s.per_sample / s.devices


def moment_flops(s: Size) -> float:
    """Second moments of the stacked features of both networks."""
    return 2 * s.tasks * s.samples * (2 * s.features) ** 2 / s.devices


def query_flops(s: Size) -> float:
    """A Cholesky factor and a solve for all rows."""
    return s.features**3 * (1 / 3 + 2) + 4 * s.tasks * s.features**2


def sweep_flops(s: Size) -> float:
    """One pass of every test set, and all folded heads on its features."""
    heads = 2 * s.preferences * s.features * s.classes
    return s.tasks * s.tests * (s.per_sample + heads) / s.devices


def statistics_bytes(s: Size) -> float:
    """Float64 moments of one task in five folds; the all-reduce sends as much."""
    return 5 * 8 * 2 * s.features**2 * 1.5


def seconds(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median after one warm-up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measured_rates(folder: Path) -> Rates:
    """Rates of this machine: a sum of tensors, two products, one file."""
    x, y = torch.randn(2, 1 << 24)
    memory = 3 * x.nbytes / seconds(lambda: torch.add(x, y, out=y))
    rates = []
    for dtype in (torch.float32, torch.float64):
        a = torch.randn(1024, 1024, dtype=dtype)
        rates.append(2 * 1024**3 / seconds(lambda a=a: a @ a))
    write_tensors(folder / "rate.safetensors", {"x": x})
    read = seconds(lambda: LazyStateDict(folder / "rate.safetensors")["x"].clone())
    return Rates(memory, *rates, x.nbytes / read)


@dataclass(frozen=True)
class Check:
    """One stage at one size: predicted and measured."""

    stage: str
    size: str
    predicted: float
    measured: float


def check_merges(rates: Rates) -> list[Check]:
    found = []
    for tasks, width in itertools.product((2, 4, 8), (512, 1024)):
        base = {f"w{i}": torch.randn(width, width) for i in range(4)}
        experts = {
            f"t{t}": {n: v + 0.01 * torch.randn(width, width) for n, v in base.items()}
            for t in range(tasks)
        }
        s = Size(parameters=4 * width**2, tasks=tasks, width=width)
        label = f"T={tasks}, P={s.parameters / 1e6:.0f} M"
        time_average = seconds(lambda b=base, e=experts: Average().merge(b, e))
        found.append(Check("Average", label, average_bytes(s) / rates.memory, time_average))
        if width == 512:
            spectral = seconds(lambda b=base, e=experts: TSVMerge().merge(b, e), 1)
            label += f", width {width}"
            found.append(Check("TSVMerge", label, spectral_flops(s) / rates.double, spectral))
    return found


def check_correction(rates: Rates) -> list[Check]:
    found = []
    for d in (256, 512, 1024):
        s = Size(tasks=1, samples=4096, features=d)
        features = torch.randn(2, s.samples, d)
        update = seconds(lambda d=d, f=features: CorrectionStatistics(d, d).update(*f))
        found.append(Check("moments", f"d={d}, n=4096", moment_flops(s) / rates.double, update))
    for tasks, d in ((2, 512), (8, 512), (32, 512), (8, 256), (8, 1024)):
        sums = {}
        for t in range(tasks):
            sums[f"t{t}"] = CorrectionStatistics(d, d)
            sums[f"t{t}"].update(torch.randn(2 * d, d), torch.randn(2 * d, d))
        correction = ClosedFormCorrection(sums, beta=1e-2, prior="identity")
        preference = torch.rand(tasks, dtype=torch.float64)
        query = seconds(lambda c=correction, p=preference: c.solve(p))
        size = Size(tasks=tasks, features=d)
        found.append(Check("query", f"T={tasks}, d={d}", query_flops(size) / rates.double, query))
    return found


def check_sweep(rates: Rates) -> list[Check]:
    def network() -> nn.Module:
        return timm.create_model("vit_small_patch32_224", img_size=64, num_classes=10).eval()

    torch.manual_seed(0)
    base = network()
    inputs = {t: torch.randn(64, 3, 64, 64) for t in ("a", "b")}
    model = merge_experts(
        {t: network() for t in inputs}, None, inputs, base=base, head="head", check=False
    )
    test = [(torch.randn(64, 3, 64, 64), torch.randint(10, (64,))) for _ in range(4)]
    flops = 2 * 5 * sum(p.numel() for n, p in base.named_parameters() if "blocks" in n)
    found = []
    for preferences in (1, 30, 120, 480):
        P = dirichlet(2, preferences, seed=0)
        folded = model.correction.fold(P, "a", *model.linear_heads()["a"])
        took = seconds(
            lambda P=P, f=folded: sweep_task(model, "a", P, test, Runtime(), folded=f), 3
        )
        s = Size(tasks=1, tests=256, features=384, classes=10, preferences=preferences)
        work = 256 * flops + sweep_flops(s) - s.tests * s.per_sample
        found.append(Check("sweep", f"P={preferences}, 256 images", work / rates.single, took))
    return found


DEVICES = {
    "this machine": None,
    "one 80-GB GPU": Rates(memory=2e12, single=60e12, double=20e12, disk=2e9),
    "eight of them": Rates(memory=2e12, single=60e12, double=20e12, disk=2e9),
}
"""Assumed rates: two thirds of the peak bandwidth, TF32 off in moments, one NVMe disk."""

SIZES = {
    "ViT-B/32, 8 tasks": Size(
        parameters=87e6, tasks=8, features=512, width=768, forward=8.8e9, preferences=120
    ),
    "ViT-L/14, 20 tasks": Size(
        parameters=304e6, tasks=20, features=768, width=1024, forward=162e9, preferences=200
    ),
    "7B parameters, 100 tasks": Size(forward=2 * 7e9 * 256, preferences=200),
}


def stages(s: Size, rates: Rates) -> dict[str, float]:
    """Seconds of every stage."""
    return {
        "read experts": 4 * s.parameters * (s.tasks + 1) / rates.disk,
        "Average": average_bytes(s) / rates.memory,
        "TSVMerge": spectral_flops(s) / rates.double,
        "calibration: forward": forward_flops(s) / rates.single,
        "calibration: read again": 4 * s.parameters * s.tasks / rates.disk / s.devices,
        "calibration: moments": moment_flops(s) / rates.double,
        "one query": query_flops(s) / rates.double,
        "sweep": sweep_flops(s) / rates.single,
    }


def extrapolated(own: Rates) -> str:
    rows = []
    for name, size in SIZES.items():
        for device, rates in DEVICES.items():
            count = 8 if device.startswith("eight") else 1
            s = Size(**{**vars(size), "devices": count})
            rows.append([name, device, *(_time(t) for t in stages(s, rates or own).values())])
    memory = [
        [
            name,
            f"{4 * s.parameters * (s.tasks + 1) / 2**30:,.0f} GiB",
            f"{2 * 4 * s.parameters / 2**30:,.1f} GiB",
            f"{4 * (s.tasks + 2) * 4 * s.width**2 / 2**30:,.2f} GiB",
            f"{s.tasks * statistics_bytes(s) / 2**30:,.2f} GiB",
        ]
        for name, s in SIZES.items()
    ]
    header = ["", "pool on disk", "two networks", "one parameter, all experts", "statistics"]
    times = table(["", "device", *stages(Size(), own)], rows)
    return f"{times}\n\n{table(header, memory)}"


def _time(s: float) -> str:
    if s < 1:
        return f"{1e3 * s:.3g} ms"
    return f"{s:.3g} s" if s < 120 else f"{s / 60:.3g} min" if s < 7200 else f"{s / 3600:.3g} h"


def main() -> None:
    """Write docs/results/scaling.md."""
    with tempfile.TemporaryDirectory() as folder:
        rates = measured_rates(Path(folder))
    checks = [*check_merges(rates), *check_correction(rates), *check_sweep(rates)]
    rows = [
        [
            f"{c.stage}, {c.size}",
            _time(c.predicted),
            _time(c.measured),
            f"{c.measured / c.predicted:.2f}",
        ]
        for c in checks
    ]
    shown = [
        ["elementwise", f"{rates.memory / 1e9:.1f} GB/s"],
        ["float32 products", f"{rates.single / 1e9:.0f} Gflop/s"],
        ["float64 products", f"{rates.double / 1e9:.0f} Gflop/s"],
        ["reading a cached file", f"{rates.disk / 1e9:.1f} GB/s"],
    ]
    path = write(
        "scaling",
        "Scaling: the cost model, checked and extrapolated",
        [0],
        [
            "Rates of this machine, measured in this run.",
            table(["work", "rate"], shown),
            "Predicted is the formula's work over the rate; the ratio should not depend on the "
            "size where the formula is right.",
            table(["stage", "predicted", "measured", "ratio"], rows),
            "Extrapolated by the formulas. Rates of GPUs are assumed (bandwidth 2 TB/s, "
            "60 Tflop/s in float32 products, 20 in float64, files at 2 GB/s), not measured.",
            extrapolated(rates),
        ],
    )
    print(path.read_text())


if __name__ == "__main__":
    main()
