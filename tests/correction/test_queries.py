"""Chebyshev preferences, two-task fronts, ablations, tasks that come and go, reports."""

import json
from collections.abc import Callable

import pytest
import torch

from lightning_merge.correction import BetaSearch, ClosedFormCorrection, CorrectionStatistics
from lightning_merge.functional.procrustes import orthogonal_factor

SIZES = {"a": 20, "b": 35, "c": 50}
FIXED = {"beta": 1e-2, "prior": "procrustes"}
QUICK = BetaSearch(anchors=(0.0, 1.0))


@pytest.mark.parametrize("bias", ["none", "shared", "per_task"])
def test_chebyshev_equalises_weighted_losses(
    make_features: Callable, make_statistics: Callable, bias: str
) -> None:
    correction = ClosedFormCorrection(
        make_statistics(make_features(SIZES)), scalarization="chebyshev", bias=bias, **FIXED
    )
    fits = [correction.fitted.fit(task) for task in correction.tasks]
    for p in ([0.5, 0.2, 0.3], [0.0, 0.4, 0.6]):
        P = torch.tensor([p], dtype=torch.float64)
        W, w = correction.solver.maps(P)[0], correction.solver.weights(P)[0]
        # The range of a loss is over the maps of the tasks that count.
        own = torch.stack([fit.own for fit, x in zip(fits, p, strict=True) if x > 0])
        nadir = [float(fit.excess(own).max()) for fit in fits]
        values = torch.tensor(
            [x * float(fit.excess(W)) / n for x, fit, n in zip(p, fits, nadir, strict=True)]
        )
        share = w * torch.tensor(nadir) / P[0].clamp_min(1e-300)
        support = share > 1e-4 * share.sum()
        assert int(support.sum()) >= 2
        assert float(values[support].min()) >= (1 - 1e-4) * float(values.max())
    one = correction.solve({"b": 1}, "b").weight
    assert torch.allclose(one, fits[1].own[:, :6], atol=1e-9)


@pytest.mark.parametrize("bias", ["none", "shared", "per_task"])
def test_13_front_equals_single_solves(
    make_features: Callable, make_statistics: Callable, bias: str
) -> None:
    features = make_features({**SIZES, "b": 3})
    correction = ClosedFormCorrection(make_statistics(features), bias=bias, **FIXED)
    front = correction.front("a", "b")
    x = torch.linspace(0, 1, 5, dtype=torch.float64)
    maps = front.maps(x, task=1)
    for value, found in zip(x.tolist(), maps, strict=True):
        solved = correction.solve({"a": 1 - value, "b": value}, "b")
        assert torch.allclose(found.weight, solved.weight, rtol=1e-8, atol=1e-8)
        if bias != "none":
            assert torch.allclose(found.bias, solved.bias, rtol=1e-8, atol=1e-8)
    Z = features["c"][0]
    turned = front.features(Z)
    s = front.scales
    points = front.parts.coordinates((1 - x) * s[0], x * s[1])
    if bias != "per_task":
        assert torch.allclose(turned @ points[2].T, maps[2](Z), atol=1e-8)
    with pytest.raises(ValueError, match="expected 0 to 1"):
        front.maps(torch.tensor([1.5]))
    with pytest.raises(KeyError, match="unknown task 'x'"):
        correction.front("a", "x")
    with pytest.raises(ValueError, match="two-task front is for"):
        ClosedFormCorrection(correction.statistics, scalarization="chebyshev", **FIXED).front(
            "a", "b"
        )


def test_ablations(make_features: Callable, make_statistics: Callable) -> None:
    statistics = make_statistics(make_features(SIZES))
    p = [0.5, 0.2, 0.3]
    own = [ClosedFormCorrection(statistics, **FIXED).solve({t: 1}).weight for t in SIZES]
    average = ClosedFormCorrection(statistics, aggregation="average", **FIXED).solve(p).weight
    assert torch.allclose(average, sum(x * W for x, W in zip(p, own, strict=True)))
    polar = ClosedFormCorrection(statistics, aggregation="polar", **FIXED)
    assert torch.allclose(polar.solve({"b": 1}).weight, own[1])
    rotation, stretch = torch.zeros(6, 6).double(), torch.zeros(6, 6).double()
    for x, W in zip(p, own, strict=True):
        values, Q = torch.linalg.eigh(W.T @ W)
        P = Q @ torch.diag(values.sqrt()) @ Q.T
        rotation, stretch = rotation + x * W @ torch.linalg.inv(P), stretch + x * P
    assert torch.allclose(polar.solve(p).weight, orthogonal_factor(rotation) @ stretch)
    with pytest.raises(ValueError, match="no shared bias"):
        ClosedFormCorrection(statistics, aggregation="polar", bias="shared")
    with pytest.raises(ValueError, match="exclude each other"):
        ClosedFormCorrection(statistics, aggregation="average", metric="head")


def test_tasks_come_and_go(make_features: Callable, make_statistics: Callable) -> None:
    statistics = make_statistics(make_features(SIZES))
    correction = ClosedFormCorrection(statistics, search=QUICK)
    W = correction.solve([1, 2, 3]).weight
    fewer = correction.without_task("b")
    assert fewer.tasks == ["a", "c"]
    assert torch.allclose(fewer.solve([1, 3]).weight, correction.solve([1, 0, 3]).weight)
    assert fewer.fitted.fit("a") is correction.fitted.fit("a")
    back = fewer.with_task("b", statistics["b"])
    again = back.solve({"a": 1, "b": 2, "c": 3}).weight
    assert torch.allclose(again, W)
    new = correction.with_task("a", statistics["a"] + statistics["b"])
    fresh = ClosedFormCorrection(
        {**statistics, "a": statistics["a"] + statistics["b"]}, search=QUICK
    )
    assert torch.allclose(new.solve([1, 2, 3]).weight, fresh.solve([1, 2, 3]).weight)
    assert torch.equal(correction.solve([1, 2, 3]).weight, W)
    with pytest.raises(KeyError, match="unknown task 'x'"):
        correction.without_task("x")
    with pytest.raises(ValueError, match="at least one task"):
        ClosedFormCorrection({"a": statistics["a"]}).without_task("a")
    with pytest.raises(ValueError, match="different backbones"):
        correction.with_task("x", CorrectionStatistics(5, 6))


@pytest.mark.parametrize("bias", ["none", "shared", "per_task"])
def test_report(make_features: Callable, make_statistics: Callable, bias: str) -> None:
    features = make_features({**SIZES, "b": 4})
    statistics = make_statistics(features)
    statistics["empty"] = CorrectionStatistics(6, 6)
    report = ClosedFormCorrection(statistics, bias=bias, search=QUICK).report()
    assert list(report) == list(features)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert sum(r["share"] for r in report.values()) == pytest.approx(1.0)
    assert report["a"]["r2"] > 0.5
    assert report["a"]["rank"] == 6
    assert report["b"]["rank"] <= 4
    for task, r in report.items():
        assert r["samples"] == len(features[task][0])
        validation = r["cross_validation"]
        if bias == "none":
            assert validation["relative_error"] <= validation["relative_error_of_doing_nothing"]
            # The linear entry of the distortion table is the same held-out error.
            ratio = validation["relative_error"] / validation["relative_error_of_doing_nothing"]
            assert r["distortion"]["linear"] == pytest.approx(1 - ratio, abs=1e-6)


def test_distortion_tells_a_rotation_from_a_scale(
    make_features: Callable, make_statistics: Callable
) -> None:
    Z = make_features({"a": 60})["a"][0]
    R = orthogonal_factor(torch.randn(6, 6, dtype=torch.float64))
    statistics = make_statistics({"r": (Z, Z @ R.T), "s": (Z, 3 * Z @ R.T), "b": (Z, Z + 1)})
    report = ClosedFormCorrection(statistics, **FIXED).report()
    assert report["r"]["distortion"]["rotation"] == pytest.approx(1.0)
    assert report["s"]["distortion"]["rotation"] < 0.9
    assert report["s"]["distortion"]["scaled_rotation"] == pytest.approx(1.0)
    assert report["b"]["distortion"]["bias"] == pytest.approx(1.0)


def test_report_of_the_paper_and_of_unequal_widths(
    make_features: Callable, make_statistics: Callable
) -> None:
    features = make_features({"a": 20}) | make_features({"b": 20}, k=4)
    report = ClosedFormCorrection.paper(make_statistics(features)).report()
    assert report["a"]["share"] is None
    assert report["b"]["distortion"] is None
    assert report["a"]["prior"] == "svd"
