"""The invariants of the specification by number, and where each is held.

| invariant | held by (in ``test_closed_form.py`` unless said) |
| --- | --- |
| 1 one-hot is the task's own map | ``test_1_*``; scales x biases x sizes below |
| 2 equal features give the identity | ``test_2_*``; anchors and ``auto`` below |
| 3, 4 rotations, scaled rotations | ``test_3_*``, ``test_4_*`` |
| 5 minimum: stacked, dual, perturbed; gradient | ``test_5_*``; gradient below |
| 6 limits of the ridge | ``test_6_*`` |
| 7 aggregation, scaling and continuity of p | ``test_7_*`` |
| 8 order, splits, ranks, files, removal | ``test_8_*``, ``test_statistics.py`` |
| 9 duplicated data, common scale | ``test_9_*``; own scales and the prior ``scaled`` below |
| 10 change of basis | ``test_10_*`` |
| 11 losses; RSS, df, GCV, evidence, PRESS, K-fold | ``test_11_*``, \
``functional/test_gcv.py``, ``functional/test_kfold.py``, ``test_search.py`` |
| 12 monotone along an edge, no domination | ``test_12_*``; three tasks below |
| 13 folded, fronts, batches, sweeps | ``test_13_*``, ``test_queries.py::test_13_*``, \
``tests/test_evaluation.py`` |
| 14 biases | ``test_14_*`` |
| 15 unequal widths | ``functional/test_procrustes.py`` |
| 16 Chebyshev, conditioning | ``test_queries.py``, ``functional/test_chebyshev.py``, \
``test_conditioning_bound``; mixtures below |
| 17 metrics and grids | ``tests/pareto`` |
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_merge.correction import BetaSearch, ClosedFormCorrection
from lightning_merge.functional.procrustes import orthogonal_factor
from lightning_merge.functional.ridge import dual_ridge
from lightning_merge.pareto import das_dennis

SMALL, LARGE = {"a": 3, "b": 4, "c": 2}, {"a": 20, "b": 35, "c": 50}
SIZES = pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["n<d", "n>d"])
BIASES = pytest.mark.parametrize("bias", ["none", "shared", "per_task"])


def fixed(statistics: dict, **options: object) -> ClosedFormCorrection:
    return ClosedFormCorrection(statistics, **{"beta": 1e-2, "prior": "procrustes", **options})


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return float((a - b).norm()) <= tolerance * max(1.0, float(b.norm()))


@SIZES
@BIASES
def test_1_no_scale_and_no_other_task_changes_a_one_hot_map(
    make_features: Callable, make_statistics: Callable, sizes: dict, bias: str
) -> None:
    features = make_features(sizes)
    statistics = make_statistics(features)
    for scale in ("none", "per_sample", "per_energy", "per_gap"):
        correction = fixed(statistics, bias=bias, task_scale=scale)
        for task, (Z, Y) in features.items():
            m, i = (Z.mean(0), Y.mean(0)) if bias != "none" else (Z.new_zeros(6), Y.new_zeros(6))
            z, y = Z - m, Y - i
            ridge = 1e-2 * float(z.square().sum()) / 6
            W = dual_ridge(z.T, y.T, orthogonal_factor(y.T @ z), ridge)
            solved = correction.solve({task: 1.0})
            assert close(solved.weight, W, 1e-8)
            if bias != "none":
                assert close(solved.bias, i - W @ m, 1e-8)


@SIZES
@BIASES
@pytest.mark.parametrize(
    "options",
    [
        {"anchor": 1e-3},
        {"anchor": 10.0, "prior": "scaled"},
        {"prior": "auto", "beta": "auto", "search": BetaSearch(anchors=(0.0, 1.0))},
    ],
    ids=["anchor", "scaled", "auto"],
)
@pytest.mark.filterwarnings("ignore:.*too few to choose by")
def test_2_equal_features_give_the_identity(
    make_features: Callable, make_statistics: Callable, sizes: dict, bias: str, options: dict
) -> None:
    features = {task: (Z, Z) for task, (Z, _) in make_features(sizes).items()}
    solved = fixed(make_statistics(features), bias=bias, **options).solve([0.2, 0.5, 0.3], "b")
    assert close(solved.weight, torch.eye(6, dtype=torch.float64))
    if solved.bias is not None:
        assert float(solved.bias.abs().max()) < 1e-9


@SIZES
@pytest.mark.parametrize("beta", [1e-6, 1e-2, 1.0, 1e3])
def test_5_the_gradient_vanishes(
    make_features: Callable, make_statistics: Callable, sizes: dict, beta: float
) -> None:
    features = make_features(sizes)
    correction = fixed(make_statistics(features), beta=beta, bias="shared")
    p = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    solved = correction.solve(p)
    W, b = solved.weight.clone().requires_grad_(), solved.bias.clone().requires_grad_()
    weights = correction.solver.weights(p[None])[0].tolist()
    terms = []
    for (task, (Z, Y)), w in zip(features.items(), weights, strict=True):
        fit = correction.fitted.fit(task)
        residual = (Z @ W.T + b - Y).square().sum()
        terms.append(w * (residual + fit.beta * (W - fit.prior).square().sum()))
    sum(terms).backward()
    size = sum(
        w * float(Y.norm() * Z.norm()) for w, (Z, Y) in zip(weights, features.values(), strict=True)
    )
    for gradient in (W.grad, b.grad):
        assert float(gradient.norm()) <= 1e-9 * max(1.0, beta) * size


@SIZES
def test_9_scales_of_the_two_features(
    make_features: Callable, make_statistics: Callable, sizes: dict
) -> None:
    """Expert over merged scale goes into the map with the scaled prior, and only with it."""
    features = make_features(sizes)
    stretched = {task: (7 * Z, 3 * Y) for task, (Z, Y) in features.items()}
    W, V = (
        fixed(make_statistics(f), prior="scaled").solve([1, 2, 3]).weight
        for f in (features, stretched)
    )
    assert close(V, 3 / 7 * W)
    W, V = (fixed(make_statistics(f)).solve([1, 2, 3]).weight for f in (features, stretched))
    assert not close(V, 3 / 7 * W, 1e-3)


@SIZES
@BIASES
def test_12_no_preference_dominates_another(
    make_features: Callable, make_statistics: Callable, sizes: dict, bias: str
) -> None:
    correction = fixed(make_statistics(make_features(sizes)), bias=bias)
    P = das_dennis(3, 6)
    maps = correction.solver.maps(P)
    losses = torch.stack([correction.fitted.fit(t).excess(maps) for t in correction.tasks], 1)
    slack = 1e-9 * losses.amax(0)
    better = (losses[:, None] < losses[None] - slack).all(-1)
    assert not bool(better.any())
    weak = (losses[:, None] <= losses[None]).all(-1) & (losses[:, None] < losses[None] - slack).any(
        -1
    )
    assert not bool(weak.any())
    assert float((losses.amax(0) - losses.amin(0)).min()) > 0  # there is something to trade


@SIZES
def test_16_mixtures_are_conditioned_as_their_tasks(
    make_features: Callable, make_statistics: Callable, sizes: dict
) -> None:
    correction = fixed(make_statistics(make_features(sizes)), beta=1e-3)
    P = das_dennis(3, 4)
    weights = correction.solver.weights(P)
    curvatures = torch.stack([correction.fitted.fit(t).curvature for t in correction.tasks])
    values = torch.linalg.eigvalsh(torch.einsum("pt,tij->pij", weights, curvatures))
    assert float((values[:, -1] / values[:, 0]).max()) <= 1 + 6 / 1e-3
