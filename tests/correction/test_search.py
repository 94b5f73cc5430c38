"""Automatic ridge and prior against refitting on the samples of each fold."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_merge.correction import BetaSearch, ClosedFormCorrection, CorrectionStatistics
from lightning_merge.correction.choice import Choice, prior_matrix
from lightning_merge.correction.mixing import CAPS
from lightning_merge.correction.search import GRID
from lightning_merge.correction.validation import cross_validated_errors
from lightning_merge.functional.head_metric import readout
from lightning_merge.functional.sums import fold_of

SMALL = {"a": 7, "b": 9}
LARGE = {"a": 30, "b": 41}
SIZES = pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["n<d", "n>d"])


def brute_error(
    Z: Tensor, Y: Tensor, choice: Choice, bias: str = "none", head: Tensor | None = None
) -> float:
    """Held-out squared error over the folds, everything refitted on the features."""
    fold, total = fold_of(torch.arange(len(Z)), 5), 0.0
    for f in range(5):
        z, y, zf, yf = Z[fold != f], Y[fold != f], Z[fold == f], Y[fold == f]
        if bias != "none":
            zf, yf, z, y = zf - z.mean(0), yf - y.mean(0), z - z.mean(0), y - y.mean(0)
        statistics = CorrectionStatistics(Z.shape[1], Y.shape[1])
        statistics.update(z, y)
        W0 = prior_matrix(choice, statistics.total(), refine=False)
        G = z.T @ z
        ridge = choice.beta * float(G.trace()) / len(G)
        if math.isinf(ridge):
            W = W0
        else:
            W = (y.T @ z + ridge * W0) @ torch.linalg.inv(G + ridge * torch.eye(len(G)).double())
        residual = zf @ W.T - yf
        if head is not None:
            residual = residual @ head.T
        total += float(residual.square().sum())
    return total


@pytest.mark.parametrize(
    ("n", "bias", "k"), [(7, "none", 8), (30, "per_task", 8), (9, "shared", 8), (12, "none", 5)]
)
def test_curve_is_the_brute_force_error(
    make_features: Callable, make_statistics: Callable, n: int, bias: str, k: int
) -> None:
    features = make_features({"a": n}, d=8, k=k)
    correction = ClosedFormCorrection(make_statistics(features), bias=bias)
    correction.choices()
    for task, (Z, Y) in features.items():
        found = correction.fitted.found[task]
        assert brute_error(Z, Y, found.choice, bias) == pytest.approx(found.score, rel=1e-7)
        for i in (30, 60):
            choice = Choice(found.choice.prior, found.choice.anchor, float(GRID[i]))
            assert brute_error(Z, Y, choice, bias) == pytest.approx(found.curve[i], rel=1e-6)
            assert found.score <= found.curve[i] * (1 + 1e-9)
        others = [("procrustes", 0.0), ("scaled", 0.0)]
        if k == 8:
            others += [("identity", 0.0), ("procrustes", 1.0), ("scaled", 10.0)]
            nothing = brute_error(Z, Y, Choice("identity", 0.0, math.inf), bias)
            assert found.score <= nothing * (1 + 1e-9)
            assert found.baseline == pytest.approx(float((Z - Y).square().sum()))
        for prior, anchor in others:
            for beta in (1e-3, 1.0):
                other = brute_error(Z, Y, Choice(prior, anchor, beta), bias)
                assert found.score <= other * (1 + 1e-3)


@SIZES
@pytest.mark.parametrize("bias", ["none", "per_task"])
def test_head_error_is_held_out_too(
    make_features: Callable, make_statistics: Callable, sizes: dict, bias: str
) -> None:
    features = make_features(sizes, d=8)
    heads = {task: (torch.randn(4, 8), None) for task in sizes}
    correction = ClosedFormCorrection(
        make_statistics(features), metric="head", heads=heads, bias=bias
    )
    correction.choices()
    for task, (Z, Y) in features.items():
        found = correction.fitted.found[task]
        rows = readout(heads[task][0].double())
        assert brute_error(Z, Y, found.choice, bias, rows) == pytest.approx(found.score, rel=1e-7)
        nothing = brute_error(Z, Y, Choice("identity", 0.0, math.inf), bias, rows)
        assert found.score <= nothing * (1 + 1e-9)
        doing_nothing = float(((Z - Y) @ rows.T).square().sum())
        assert found.baseline == pytest.approx(doing_nothing)


def test_nothing_to_gain_keeps_the_features(
    make_features: Callable, make_statistics: Callable
) -> None:
    features = {
        task: (Z, Z + 5 * torch.randn_like(Z)) for task, (Z, _) in make_features(SMALL, d=8).items()
    }
    correction = ClosedFormCorrection(make_statistics(features))
    for task, choice in correction.choices().items():
        found = correction.fitted.found[task]
        assert found.score <= found.baseline * (1 + 1e-12)
        assert choice["searched"]
    equal = {task: (Z, Z) for task, (Z, _) in features.items()}
    correction = ClosedFormCorrection(make_statistics(equal))
    assert correction.choices()["a"]["prior"] == "identity"
    assert correction.choices()["a"]["beta"] == "inf"
    assert torch.allclose(correction.solve([1, 1]).weight, torch.eye(8).double(), atol=1e-9)


def test_a_task_without_evidence_does_not_bind_the_others(
    make_features: Callable, make_statistics: Callable
) -> None:
    features = make_features({"a": 60, "b": 60}, d=8)
    Z = features["b"][0]
    features["b"] = (Z, Z)
    statistics = make_statistics(features)
    correction = ClosedFormCorrection(statistics)
    assert correction.choices()["b"]["beta"] == "inf"
    assert torch.allclose(correction.solve({"b": 1}).weight, torch.eye(8).double(), atol=1e-9)
    own, mixed = correction.solve({"a": 1}).weight, correction.solve([0.9, 0.1]).weight
    moved = float((mixed - torch.eye(8).double()).norm() / (own - torch.eye(8).double()).norm())
    assert moved > 0.5
    literal = ClosedFormCorrection(statistics, beta={"a": 0.01, "b": math.inf}, prior="identity")
    assert torch.allclose(literal.solve([0.9, 0.1]).weight, torch.eye(8).double())


def test_prior_alone_is_sought_at_a_given_ridge(
    make_features: Callable, make_statistics: Callable
) -> None:
    features = make_features(LARGE, d=8)
    correction = ClosedFormCorrection(make_statistics(features), beta=0.5)
    for task, choice in correction.choices().items():
        assert choice["beta"] == 0.5
        found = correction.fitted.found[task]
        assert brute_error(*features[task], found.choice) == pytest.approx(found.score, rel=1e-7)
        for prior in ("identity", "procrustes", "scaled"):
            other = brute_error(*features[task], Choice(prior, 0.0, 0.5))
            assert found.score <= other * (1 + 1e-9)
    ClosedFormCorrection(make_statistics(features), beta=0.0).solve([1, 1])
    ClosedFormCorrection(make_statistics(features), beta=math.inf).solve([1, 1])


@pytest.mark.parametrize("mode", ["per_sample", "absolute"])
def test_modes_name_the_same_ridge(
    make_features: Callable, make_statistics: Callable, mode: str
) -> None:
    statistics = make_statistics(make_features(LARGE, d=8))
    few = BetaSearch(anchors=(0.0, 1.0))
    relative = ClosedFormCorrection(statistics, search=few)
    other = ClosedFormCorrection(statistics, beta_mode=mode, search=few)
    p = [0.3, 0.7]
    assert torch.allclose(relative.solve(p).weight, other.solve(p).weight, atol=1e-10)


@pytest.mark.parametrize("bias", ["none", "shared", "per_task"])
def test_the_cap_of_mixtures_has_the_least_held_out_error(
    make_features: Callable, make_statistics: Callable, bias: str
) -> None:
    features = make_features({"a": 6, "b": 9, "c": 7}, d=8, noise=1.0)
    options = {"bias": bias, "search": BetaSearch(anchors=(0.0, 1.0))}
    correction = ClosedFormCorrection(make_statistics(features), **options)
    chosen = correction.fitted.cap()
    errors = {}
    for cap in CAPS:
        correction.fitted.mixing_cap = cap
        found = cross_validated_errors(correction, [1, 1, 1])
        errors[cap] = sum(
            error.corrected * _variance(features[task][1], bias) for task, error in found.items()
        )
    assert errors[chosen] <= min(errors.values()) * (1 + 1e-9)
    assert len(set(errors.values())) > 1
    own = correction.solve({"a": 1}, "a").weight
    correction.fitted.mixing_cap = chosen
    assert torch.equal(own, correction.solve({"a": 1}, "a").weight)


def _variance(Y: Tensor, bias: str) -> float:
    """Variance over the energy that the search divides by."""
    variance = float((Y - Y.mean(0)).square().sum())
    return variance / (float(Y.square().sum()) if bias == "none" else variance)


def test_stored_choices_spare_the_search(
    make_features: Callable, make_statistics: Callable
) -> None:
    statistics = make_statistics(make_features(LARGE, d=8))
    first = ClosedFormCorrection(statistics)
    stored = json.loads(json.dumps(first.choices()))
    second = ClosedFormCorrection(statistics, choices=stored)
    assert torch.equal(first.solve([1, 2]).weight, second.solve([1, 2]).weight)
    assert not second.fitted.found


def test_choices_of_another_metric_are_not_reused(
    make_features: Callable, make_statistics: Callable
) -> None:
    statistics = make_statistics(make_features(LARGE, d=8))
    heads = {task: (torch.randn(4, 8), None) for task in LARGE}
    behind = {"metric": "head", "heads": heads}
    one, other = ClosedFormCorrection(statistics), ClosedFormCorrection(statistics, **behind)
    assert one.choices()["a"]["metric"] == "representation"
    assert other.choices()["a"]["metric"] == "head"
    assert one.choices() != other.choices()
    swapped = ClosedFormCorrection(statistics, choices=one.choices(), **behind)
    assert swapped.settled() == {}
    assert swapped.choices() == other.choices()
    assert set(swapped.fitted.found) == set(LARGE)
    given = {"beta": 0.5, "prior": "identity"}
    found = ClosedFormCorrection(statistics, choices=one.choices(), **given).choices()
    assert found == ClosedFormCorrection(statistics, **given).choices()


@pytest.mark.parametrize("criterion", ["gcv", "evidence"])
def test_in_sample_criteria(
    make_features: Callable, make_statistics: Callable, criterion: str
) -> None:
    statistics = make_statistics(make_features(LARGE, d=8))
    options = BetaSearch(criterion=criterion)
    correction = ClosedFormCorrection(statistics, prior="procrustes", search=options)
    correction.solve([1, 1])
    found = correction.fitted.found["a"]
    assert found.score <= min(found.curve)
    assert 1e-8 < found.choice.beta < math.inf
    with pytest.raises(ValueError, match="held-out"):
        ClosedFormCorrection(statistics, search=options).solve([1, 1])


def test_one_standard_error_takes_a_stronger_ridge(
    make_features: Callable, make_statistics: Callable
) -> None:
    statistics = make_statistics(make_features(LARGE, d=8, noise=1.0))
    best = ClosedFormCorrection(statistics, prior="identity")
    strong = ClosedFormCorrection(
        statistics, prior="identity", search=BetaSearch(one_standard_error=True)
    )
    for task in LARGE:
        assert strong.fitted.choice(task).beta > best.fitted.choice(task).beta
        assert strong.fitted.found[task].score >= best.fitted.found[task].score


@pytest.mark.parametrize("folds", [None, 5])
def test_too_few_samples_fall_back_with_a_warning(
    make_features: Callable, make_statistics: Callable, folds: int | None
) -> None:
    features = make_features({"a": 1 if folds else 20}, d=8)
    correction = ClosedFormCorrection(make_statistics(features, num_folds=folds))
    with pytest.warns(UserWarning, match="'a': .* too few to choose by"):
        W = correction.solve([1]).weight
    assert bool(W.isfinite().all())
    assert correction.choices()["a"]["beta"] == 0.01


@pytest.mark.parametrize("bias", ["shared", "per_task"])
def test_a_bias_needs_two_samples_to_train_on(
    make_features: Callable, make_statistics: Callable, bias: str
) -> None:
    statistics = make_statistics(make_features({"a": 2}, d=8))
    with pytest.warns(UserWarning, match="too few to choose by"):
        W = ClosedFormCorrection(statistics, bias=bias).solve([1]).weight
    assert bool(W.isfinite().all())
    statistics = make_statistics(make_features({"a": 1}, d=8))
    fixed = ClosedFormCorrection(statistics, bias=bias, beta=0.1, prior="identity")
    with pytest.raises(ValueError, match="'a': its 1 calibration samples have equal features"):
        fixed.solve([1])


def test_two_samples_are_enough(make_features: Callable, make_statistics: Callable) -> None:
    features = make_features({"a": 2, "b": 3}, d=8)
    correction = ClosedFormCorrection(make_statistics(features))
    assert bool(correction.solve([1, 1]).weight.isfinite().all())


def test_a_ridge_at_the_edge_warns(make_statistics: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(400, 4, generator=generator, dtype=torch.float64)
    Z = Z * torch.logspace(0, -7, 4, dtype=torch.float64)
    Y = Z * torch.logspace(0, 7, 4, dtype=torch.float64)
    correction = ClosedFormCorrection(make_statistics({"a": (Z, Y)}), prior="identity")
    with pytest.warns(UserWarning, match="'a': the best ridge is the weakest"):
        correction.solve([1])


def test_harm_is_told(make_statistics: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    Y = Z + torch.randn(4, 8, generator=generator, dtype=torch.float64)
    statistics = make_statistics({"a": (Z, Y)})
    with pytest.warns(UserWarning, match="'a': on held-out samples .* use bias='none'"):
        ClosedFormCorrection(statistics, bias="per_task").choices()
    with pytest.warns(UserWarning, match="'a': on held-out samples"):
        ClosedFormCorrection(statistics, prior=-torch.eye(8)).choices()
    found = ClosedFormCorrection(statistics)
    found.choices()
    assert found.fitted.found["a"].score <= found.fitted.found["a"].baseline * (1 + 1e-12)


def test_a_dominant_mean_warns(make_statistics: Callable) -> None:
    Z = torch.randn(30, 4, dtype=torch.float64) + 1e6
    statistics = make_statistics({"a": (Z, Z)})
    with pytest.warns(UserWarning, match="'a': the mean holds nearly all"):
        ClosedFormCorrection(statistics, bias="shared", beta=0.1, prior="identity").solve([1])


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="gamma"):
        BetaSearch(gamma=0.5)
    with pytest.raises(ValueError, match="anchors"):
        BetaSearch(anchors=(-1.0,))
