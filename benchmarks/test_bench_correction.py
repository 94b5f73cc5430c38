"""Time of correction queries: ``pytest benchmarks/test_bench_correction.py --benchmark-enable``.

Goals on two cores at d = 512 and T = 8: folded heads of one preference in 10 ms, of a lattice of
120 preferences in 1 s, cost linear in T.
"""

import functools

import pytest
import torch
from torch import Tensor

from lightning_merge.correction import ClosedFormCorrection, CorrectionStatistics, HeadMetric

CLASSES = (10, 10, 43, 45, 47, 100, 196, 397)
"""Classes of eight image tasks."""


@functools.cache
def tasks(count: int, d: int = 512, n: int = 1024) -> dict[str, CorrectionStatistics]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    spectrum = torch.logspace(0, -1.5, d)
    statistics: dict[str, CorrectionStatistics] = {}
    if count > 8:  # time does not depend on the numbers: reuse eight tasks
        few = list(tasks(8, d, n).values())
        return {f"t{t}": few[t % 8] for t in range(count)}
    for t in range(count):
        merged = normal(n, d) * spectrum
        true = torch.eye(d) + 0.3 * normal(d, d) / d**0.5
        statistics[f"t{t}"] = CorrectionStatistics(d, d)
        statistics[f"t{t}"].update(merged, merged @ true.T + 0.02 * normal(n, d))
    return statistics


def heads(count: int, d: int = 512, classes: tuple[int, ...] = CLASSES) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        f"t{t}": (torch.randn(classes[t % len(classes)], d, generator=generator), None)
        for t in range(count)
    }


def lattice(count: int, points: int = 120) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    P = torch.rand(points, count, generator=generator, dtype=torch.float64) + 0.01
    return P / P.sum(1, keepdim=True)


@functools.cache
def ready(count: int = 8) -> ClosedFormCorrection:
    correction = ClosedFormCorrection(tasks(count), beta=1e-2, prior="procrustes")
    if count > 8:
        few = ready(8)
        correction.fitted._fits |= {f"t{t}": few.fitted.fit(f"t{t % 8}") for t in range(count)}
    correction.solve([1.0] * count)  # priors and factors are cached; queries are what is timed
    return correction


@pytest.mark.parametrize("task", ["t0", "t7"], ids=["10 classes", "397 classes"])
def test_one_folded_head(benchmark, task: str) -> None:
    H, c = heads(8)[task]
    p = lattice(8, 1)[0]
    weight, _ = benchmark(lambda: ready().fold(p, task, H, c))
    assert weight.shape == H.shape


@pytest.mark.parametrize("count", [2, 8, 64])
def test_map_by_number_of_tasks(benchmark, count: int) -> None:
    p = lattice(count, 1)[0]
    solved = benchmark(lambda: ready(count).solve(p))
    assert solved.weight.shape == (512, 512)


def test_lattice_of_one_task(benchmark) -> None:
    P, (H, c) = lattice(8), heads(8)["t2"]
    weight, _ = benchmark.pedantic(lambda: ready().fold(P, "t2", H, c), rounds=3, warmup_rounds=1)
    assert weight.shape == (120, 43, 512)


def test_lattice_of_all_tasks(benchmark) -> None:
    P, all_heads = lattice(8), heads(8)
    folder = ready()

    def run() -> int:
        return sum(len(chunk["t0"][0]) for chunk in folder.fold_heads(P, all_heads))

    assert benchmark.pedantic(run, rounds=3, warmup_rounds=1) == 120


def test_head_metric_of_independent_heads(benchmark) -> None:
    few = heads(8, classes=(10, 20, 43, 45, 47, 60, 80, 100))
    correction = ClosedFormCorrection(
        tasks(8), metric="head", heads=few, beta=1e-2, prior="procrustes"
    )
    P = lattice(8, 8)
    correction.solve_many(P)
    maps = benchmark.pedantic(lambda: correction.solve_many(P), rounds=3)
    assert len(maps) == 8


def test_head_metric_of_competing_heads(benchmark) -> None:
    correction = ClosedFormCorrection(
        tasks(8),
        metric="head",
        heads=heads(8),
        beta=1e-2,
        prior="procrustes",
        head=HeadMetric(tolerance=1e-6),
    )
    p = lattice(8, 1)
    correction.solver.fitted.fit("t0")

    def run() -> int:
        correction.solver._solvers.clear()
        return len(correction.solve_many(p))

    assert benchmark.pedantic(run, rounds=1, warmup_rounds=1) == 1


def test_search_of_one_task(benchmark) -> None:
    statistics = {"t0": tasks(8)["t0"]}
    choices = benchmark.pedantic(lambda: ClosedFormCorrection(statistics).choices(), rounds=1)
    assert choices["t0"]["searched"]
