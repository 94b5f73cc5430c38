"""The head-aware metric of a whole correction, and held-out scores of any."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_merge.correction import (
    BetaSearch,
    ClosedFormCorrection,
    CorrectionOptions,
    CorrectionStatistics,
    HeadMetric,
)
from lightning_merge.correction.validation import cross_validated_errors
from lightning_merge.functional.head_metric import readout
from lightning_merge.functional.sums import fold_of

SIZES = {"a": 30, "b": 25, "c": 40}
FIXED = {"beta": 1e-2, "prior": "procrustes"}
QUICK = BetaSearch(anchors=(0.0, 1.0))


def heads_of(rows: int, k: int = 9, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        task: (
            torch.randn(rows, k, generator=generator),
            torch.randn(rows, generator=generator),
        )
        for task in SIZES
    }


@pytest.mark.parametrize("bias", ["none", "shared", "per_task"])
def test_independent_heads_have_no_trade_off(
    make_features: Callable, make_statistics: Callable, bias: str
) -> None:
    statistics = make_statistics(make_features(SIZES, d=9))
    heads = heads_of(4)
    correction = ClosedFormCorrection(statistics, metric="head", heads=heads, bias=bias, **FIXED)
    for p in ([0.2, 0.3, 0.5], [0.01, 0.98, 0.01]):
        for task, (H, c) in heads.items():
            shared, own = (correction.fold(q, task, H, c) for q in (p, {task: 1}))
            # Logits differ by one number for all classes at most: probabilities are equal.
            for x, y in zip(shared, own, strict=True):
                assert torch.allclose(x - x.mean(0), y - y.mean(0), atol=1e-8)
    plain = ClosedFormCorrection(statistics, bias=bias, **FIXED)
    for task in SIZES:
        W, V = correction.solve({task: 1}).weight, plain.solve({task: 1}).weight
        assert torch.allclose(W, V, atol=1e-10)


@pytest.mark.parametrize("bias", ["none", "shared"])
@pytest.mark.parametrize("sizes", [SIZES, {"a": 3, "b": 5, "c": 4}], ids=["n>d", "n<d"])
def test_competing_heads_equal_a_dense_solve(
    make_features: Callable, make_statistics: Callable, bias: str, sizes: dict
) -> None:
    k = 5
    statistics = make_statistics(make_features(sizes, d=k))
    heads = heads_of(7, k)
    weight = 1e-2
    correction = ClosedFormCorrection(
        statistics,
        metric="head",
        heads=heads,
        bias=bias,
        head=HeadMetric(representation_weight=weight, tolerance=1e-12),
        **FIXED,
    )
    P = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.4, 0.0], [0, 1, 0]], dtype=torch.float64)
    maps = correction.solver.maps(P)
    w = correction.solver.weights(P)
    for row, W in zip(w, maps, strict=True):
        big, right = torch.zeros(1).double(), torch.zeros(1).double()
        for x, task in zip(row, SIZES, strict=True):
            fit = correction.fitted.fit(task)
            rows = readout(heads[task][0].double())
            S = rows.T @ rows + weight * torch.eye(k).double()
            big = big + x * torch.kron(S, fit.curvature)
            right = right + x * (S @ fit.target).flatten()
        expected = torch.linalg.solve(big, right).view(W.shape)
        assert torch.allclose(W, expected, rtol=1e-6, atol=1e-7)
    again = correction.solver.maps(P[:1] + 1e-4)  # starts from the last solutions
    assert torch.allclose(again[0], maps[0], atol=1e-2)
    H, c = heads["b"]
    folded = correction.fold(P, "b", H, c)
    explicit = correction.solve_many(P).fold(H, c)
    for x, y in zip(folded, explicit, strict=True):
        assert torch.allclose(x, y, atol=1e-7)


def test_a_large_representation_weight_is_the_representation_metric(
    make_features: Callable, make_statistics: Callable
) -> None:
    statistics = make_statistics(make_features(SIZES, d=5))
    options = {"task_scale": "none", **FIXED}
    correction = ClosedFormCorrection(
        statistics,
        metric="head",
        heads=heads_of(7, 5),
        head=HeadMetric(representation_weight=1e9),
        **options,
    )
    plain = ClosedFormCorrection(statistics, **options).solve([1, 2, 3]).weight
    assert torch.allclose(correction.solve([1, 2, 3]).weight, plain, atol=1e-6)


def test_chebyshev_behind_heads(make_features: Callable, make_statistics: Callable) -> None:
    statistics = make_statistics(make_features({"a": 30, "b": 25}, d=5))
    heads = {task: head for task, head in heads_of(7, 5).items() if task != "c"}
    correction = ClosedFormCorrection(
        statistics,
        metric="head",
        heads=heads,
        scalarization="chebyshev",
        head=HeadMetric(tolerance=1e-11),
        **FIXED,
    )
    p = torch.tensor([[0.3, 0.7]], dtype=torch.float64)
    W = correction.solver.maps(p)[0]
    values = []
    for x, task in zip(p[0], heads, strict=True):
        fit, S = correction.fitted.fit(task), correction.fitted.metric(task)
        own = torch.stack([correction.fitted.fit(t).own for t in heads])
        values.append(float(x * fit.excess(W, S) / fit.excess(own, S).max()))
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_heads_are_checked(make_features: Callable, make_statistics: Callable) -> None:
    statistics = make_statistics(make_features(SIZES, d=9))
    heads = heads_of(4)
    with pytest.raises(ValueError, match=r"missing: \['a', 'b', 'c'\]"):
        ClosedFormCorrection(statistics, metric="head")
    with pytest.raises(ValueError, match=r"missing: \['b'\]"):
        ClosedFormCorrection(
            statistics, metric="head", heads={t: h for t, h in heads.items() if t != "b"}
        )
    with pytest.raises(ValueError, match="head of 'a'"):
        ClosedFormCorrection(
            statistics, metric="head", heads={**heads, "a": (torch.ones(3, 8), None)}
        )
    for bad in ({"representation_weight": 0.0}, {"tolerance": 2.0}, {"max_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            HeadMetric(**bad)
    correction = ClosedFormCorrection(statistics, metric="head", heads=heads, **FIXED)
    with pytest.raises(ValueError, match="needs its head"):
        correction.with_task("d", statistics["a"])
    more = correction.with_task("d", statistics["a"], heads["a"])
    assert more.solve([1, 1, 1, 1]).weight.shape == (9, 9)
    assert more.without_task("d").tasks == correction.tasks


def brute_held_out(
    features: dict, p: dict | None, heads: dict | None, **options: object
) -> dict[str, tuple[float, float]]:
    """Refit on all folds but one, from the features, and measure on that one."""
    errors = {task: [0.0, 0.0] for task in features}
    full = {}
    for task, (Z, Y) in features.items():
        full[task] = CorrectionStatistics(Z.shape[1], Y.shape[1])
        full[task].update(Z, Y)
    chosen = ClosedFormCorrection(full, **options).choices()
    energy = {task: float(Y.square().sum()) for task, (_, Y) in features.items()}
    for f in range(5):
        train, held = {}, {}
        for task, (Z, Y) in features.items():
            fold = fold_of(torch.arange(len(Z)), 5)
            train[task] = CorrectionStatistics(Z.shape[1], Y.shape[1])
            train[task].update(Z[fold != f], Y[fold != f])
            held[task] = (Z[fold == f], Y[fold == f])
        # Scales are those of all samples.
        q = None
        correction = ClosedFormCorrection(
            train, **{**options, "task_scale": "none"}, choices=chosen
        )
        if p is not None:
            q = {task: x / energy[task] for task, x in p.items()}
        for task, (Z, Y) in held.items():
            solved = correction.solve({task: 1} if q is None else q, task)
            for i, residual in enumerate((solved(Z) - Y, Z - Y)):
                if heads is not None:
                    residual = residual @ readout(heads[task][0].double()).T
                errors[task][i] += float(residual.square().sum())
    result = {}
    for task, (_, Y) in features.items():
        read = Y if heads is None else Y @ readout(heads[task][0].double()).T
        variance = float((read - read.mean(0)).square().sum())
        result[task] = (errors[task][0] / variance, errors[task][1] / variance)
    return result


@pytest.mark.parametrize(
    ("p", "behind_heads", "bias"),
    [
        (None, True, "per_task"),
        (None, False, "none"),
        ({"a": 0.2, "b": 0.3, "c": 0.5}, True, "none"),
        ({"a": 0.2, "b": 0.3, "c": 0.5}, False, "per_task"),
    ],
)
def test_held_out_errors_equal_refitting(
    make_features: Callable,
    make_statistics: Callable,
    p: dict | None,
    behind_heads: bool,
    bias: str,
) -> None:
    features = make_features(SIZES, d=9)
    heads = heads_of(4) if behind_heads else None
    if bias == "per_task":  # energies are then centred
        features = {t: (Z, Y - Y.mean(0)) for t, (Z, Y) in features.items()}
    correction = ClosedFormCorrection(make_statistics(features), bias=bias, search=QUICK)
    found = cross_validated_errors(correction, p, heads)
    expected = brute_held_out(features, p, heads, bias=bias, search=QUICK)
    for task, error in found.items():
        assert error.corrected == pytest.approx(expected[task][0], rel=1e-6)
        assert error.identity == pytest.approx(expected[task][1], rel=1e-6)
        assert error.gain == pytest.approx(1 - error.corrected / error.identity)


def test_held_out_errors_rank_metrics(make_features: Callable, make_statistics: Callable) -> None:
    """Measured behind heads, the head metric beats the representation metric in a mixture."""
    statistics = make_statistics(make_features(SIZES, d=9, noise=0.05))
    heads = heads_of(4)
    plain = ClosedFormCorrection(statistics, search=QUICK)
    head = ClosedFormCorrection(statistics, metric="head", heads=heads, search=QUICK)
    a, b = (cross_validated_errors(c, [1, 1, 1], heads) for c in (plain, head))
    assert all(b[task].corrected < a[task].corrected for task in SIZES)
    own = cross_validated_errors(head)
    for task in SIZES:
        assert own[task].corrected == pytest.approx(b[task].corrected, rel=0.05)


def test_held_out_errors_need_folds(make_features: Callable, make_statistics: Callable) -> None:
    statistics = make_statistics(make_features(SIZES, d=9), num_folds=None)
    with pytest.raises(ValueError, match="at least two with samples"):
        cross_validated_errors(ClosedFormCorrection(statistics, **FIXED))
    averaged = ClosedFormCorrection(
        make_statistics(make_features(SIZES, d=9)), aggregation="average", **FIXED
    )
    with pytest.raises(ValueError, match="not cross-validated"):
        cross_validated_errors(averaged, [1, 1, 1])


@pytest.mark.parametrize("bias", ["none", "shared"])
def test_folded_heads_equal_explicit_maps_where_heads_are_independent(
    make_features: Callable, make_statistics: Callable, bias: str
) -> None:
    """Of active tasks, of inactive ones and of a head unknown to the metric; again when warm."""
    statistics = make_statistics(make_features(SIZES, d=11))
    heads = heads_of(4, 11)
    correction = ClosedFormCorrection(statistics, metric="head", heads=heads, bias=bias, **FIXED)
    P = torch.tensor(
        [[0.2, 0.3, 0.5], [0.6, 0.4, 0.0], [0, 1, 0], [0.1, 0.8, 0.1]], dtype=torch.float64
    )
    maps = correction.solve_many(P)
    foreign = heads_of(5, 11, seed=3)
    for asked in (heads, foreign, heads):
        (found,) = correction.fold_heads(P, asked)
        for task, (H, c) in asked.items():
            for x, y in zip(found[task], maps.fold(H, c), strict=True):
                assert torch.allclose(x, y, atol=1e-8)
    for row, p in zip(maps.weight, P, strict=True):
        one = correction.solve(p).weight
        assert torch.allclose(one, row, atol=1e-8)
        weight, _ = correction.fold(p, "c", *heads["c"])
        assert torch.allclose(weight, heads["c"][0].double() @ row, atol=1e-8)


def test_kept_rows_are_within_the_memory_cap(
    make_features: Callable, make_statistics: Callable
) -> None:
    statistics = make_statistics(make_features(SIZES, d=9))
    correction = ClosedFormCorrection(statistics, memory_cap=4096, **FIXED)
    for seed in range(6):
        for task, head in heads_of(4, seed=seed).items():
            correction.fold([1, 1, 1], task, *head)
    kept = correction._folder._kept
    assert kept
    assert sum(rows.memory for rows in kept) <= 4096


def test_auto_takes_the_head_metric_unless_heads_compete(
    make_features: Callable, make_statistics: Callable
) -> None:
    statistics = make_statistics(make_features(SIZES, d=9))
    options = CorrectionOptions(**FIXED)
    assert options.metric == "auto"
    assert CorrectionOptions.from_dict(options.as_dict()) == options
    assert options.build(statistics, heads_of(4)).metric == "head"
    assert options.build(statistics, heads_of(5)).metric == "representation"
    silent = {task: (torch.ones(4, 9), None) for task in SIZES}
    assert options.build(statistics, silent).metric == "representation"
    chebyshev = CorrectionOptions(scalarization="chebyshev", **FIXED)
    assert chebyshev.build(statistics, heads_of(4)).metric == "representation"
    assert CorrectionOptions.paper().build(statistics, heads_of(4)).metric == "representation"
    saved = options.as_dict() | {"metric": "representation"}
    old = CorrectionOptions.from_dict(saved)
    assert old.build(statistics, heads_of(4)).metric == "representation"


def test_chebyshev_of_independent_heads_has_nothing_to_trade(
    make_features: Callable, make_statistics: Callable
) -> None:
    statistics = make_statistics(make_features(SIZES, d=9))
    heads = heads_of(4)
    both = [
        ClosedFormCorrection(statistics, metric="head", heads=heads, scalarization=kind, **FIXED)
        for kind in ("linear", "chebyshev")
    ]
    one, other = (correction.solve([1, 2, 3]).weight for correction in both)
    assert torch.equal(one, other)
