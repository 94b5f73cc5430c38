"""Exact algebra of the correction; the numbers in names are those of the invariants."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_merge.correction import ClosedFormCorrection, CorrectionStatistics
from lightning_merge.functional.procrustes import orthogonal_factor
from lightning_merge.functional.ridge import dual_ridge

BETAS = [1e-6, 1e-2, 1.0, 1e3]
SMALL = {"a": 3, "b": 4, "c": 2}
LARGE = {"a": 20, "b": 35, "c": 50}
SIZES = pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["n<d", "n>d"])


def fixed(statistics: dict, **options: object) -> ClosedFormCorrection:
    """A correction with nothing to search for."""
    return ClosedFormCorrection(statistics, **{"beta": 1e-2, "prior": "procrustes", **options})


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return float((a - b).norm()) <= tolerance * max(1.0, float(b.norm()))


def objective(
    W: Tensor, features: dict, weights: list[float], betas: list[float], priors: list[Tensor]
) -> float:
    """Penalised loss from the features themselves."""
    total = 0.0
    for (Z, Y), w, beta, W0 in zip(features.values(), weights, betas, priors, strict=True):
        total += w * float((Z @ W.T - Y).square().sum() + beta * (W - W0).square().sum())
    return total


def pieces(correction: ClosedFormCorrection) -> tuple[list[float], list[Tensor]]:
    fits = [correction.fitted.fit(task) for task in correction.tasks]
    return [fit.beta for fit in fits], [fit.prior for fit in fits]


@SIZES
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("mode", ["relative", "per_sample", "absolute"])
def test_1_one_hot_is_the_tasks_own_ridge(
    make_features: Callable, make_statistics: Callable, sizes: dict, beta: float, mode: str
) -> None:
    features = make_features(sizes)
    scales = ("none", "per_sample", "per_energy", "per_gap") if mode == "relative" else ("none",)
    for scale in scales:
        correction = fixed(make_statistics(features), beta=beta, beta_mode=mode, task_scale=scale)
        for task, (Z, Y) in features.items():
            G, A = Z.T @ Z, Y.T @ Z
            unit = {"relative": G.trace() / 6, "per_sample": len(Z), "absolute": 1.0}[mode]
            ridge = float(beta * unit)
            W = dual_ridge(Z.T, Y.T, orthogonal_factor(A), ridge)
            assert close(correction.solve({task: 2.0}).weight, W, 1e-8)


@SIZES
@pytest.mark.parametrize("prior", ["procrustes", "scaled", "identity"])
@pytest.mark.parametrize("beta", [0.0, *BETAS, math.inf])
def test_2_equal_features_give_the_identity(
    make_features: Callable, make_statistics: Callable, sizes: dict, prior: str, beta: float
) -> None:
    features = {task: (Z, Z) for task, (Z, _) in make_features(sizes).items()}
    for bias in ("none", "shared"):
        correction = fixed(make_statistics(features), prior=prior, beta=beta, bias=bias)
        solved = correction.solve({"a": 0.2, "b": 0.5, "c": 0.3})
        assert close(solved.weight, torch.eye(6, dtype=torch.float64))
        if solved.bias is not None:
            assert float(solved.bias.abs().max()) < 1e-9


def test_2_fails_with_the_papers_prior(make_features: Callable, make_statistics: Callable) -> None:
    features = {task: (Z, Z) for task, (Z, _) in make_features(SMALL).items()}
    W = ClosedFormCorrection.paper(make_statistics(features)).solve([1, 1, 1]).weight
    assert not close(W, torch.eye(6, dtype=torch.float64), 1e-2)


@SIZES
@pytest.mark.parametrize("beta", BETAS)
def test_3_a_rotation_is_found(
    make_features: Callable, make_statistics: Callable, sizes: dict, beta: float
) -> None:
    R = orthogonal_factor(torch.randn(6, 6, dtype=torch.float64))
    features = {task: (Z, Z @ R.T) for task, (Z, _) in make_features(sizes).items()}
    correction = fixed(make_statistics(features), beta=beta)
    W = correction.solve({"b": 1.0}).weight
    Z = features["b"][0]
    assert close(Z @ W.T, Z @ R.T)
    assert close(W @ W.T, torch.eye(6, dtype=torch.float64))
    if sizes is LARGE:
        assert close(correction.solve([1, 1, 1]).weight, R)


def test_4_scaled_rotation(make_features: Callable, make_statistics: Callable) -> None:
    R = 3.0 * orthogonal_factor(torch.randn(6, 6, dtype=torch.float64))
    features = {task: (Z, Z @ R.T) for task, (Z, _) in make_features(LARGE).items()}
    statistics = make_statistics(features)
    for beta in BETAS:
        solved = fixed(statistics, beta=beta, prior="scaled").solve([1, 2, 3])
        assert close(solved.weight, R)
    assert close(fixed(statistics, beta=0.0).solve([1, 2, 3]).weight, R)
    assert not close(fixed(statistics, beta=1.0).solve([1, 2, 3]).weight, R, 1e-2)


@SIZES
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [6, 4, 9])
def test_5_minimises_the_stacked_least_squares(
    make_features: Callable, make_statistics: Callable, sizes: dict, beta: float, k: int
) -> None:
    features = make_features(sizes, k=k)
    correction = fixed(make_statistics(features), beta=beta, task_scale="none")
    p = [0.5, 0.2, 0.3]
    W = correction.solve(p).weight
    betas, priors = pieces(correction)
    columns, wanted = [], []
    for (Z, Y), w, b, W0 in zip(features.values(), p, betas, priors, strict=True):
        columns += [w**0.5 * Z.T, (w * b) ** 0.5 * torch.eye(6, dtype=torch.float64)]
        wanted += [w**0.5 * Y.T, (w * b) ** 0.5 * W0]
    stacked = torch.linalg.lstsq(torch.cat(columns, 1).T, torch.cat(wanted, 1).T).solution.T
    assert close(W, stacked, 1e-8)
    mean = sum(w * b for w, b in zip(p, betas, strict=True))
    prior = sum(w * b * W0 for w, b, W0 in zip(p, betas, priors, strict=True)) / mean
    Z = torch.cat([w**0.5 * Z.T for (Z, _), w in zip(features.values(), p, strict=True)], 1)
    Y = torch.cat([w**0.5 * Y.T for (_, Y), w in zip(features.values(), p, strict=True)], 1)
    assert close(W, dual_ridge(Z, Y, prior, mean), 1e-8)
    best = objective(W, features, p, betas, priors)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        step = 1e-2 * torch.randn(W.shape, generator=generator, dtype=torch.float64)
        assert objective(W + step, features, p, betas, priors) > best


@SIZES
def test_6_limits_of_the_ridge(
    make_features: Callable, make_statistics: Callable, sizes: dict
) -> None:
    statistics = make_statistics(make_features(sizes))
    p = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    for mode in ("relative", "absolute", "per_sample"):
        for bias in ("none", "shared"):

            def solve(beta: float, mode: str = mode, bias: str = bias) -> Tensor:
                return fixed(
                    statistics, beta=beta, beta_mode=mode, bias=bias
                ).solve(p).weight  # fmt: skip

            assert close(solve(0.0), solve(1e-9), 1e-5)
            assert close(solve(math.inf), solve(1e9), 1e-5)
    correction = fixed(statistics, beta=1.0)
    betas, priors = pieces(correction)
    w = correction.solver.weights(p[None])[0]
    mean = sum(x * b * W0 for x, b, W0 in zip(w, betas, priors, strict=True))
    mean = mean / sum(x * b for x, b in zip(w, betas, strict=True))
    assert close(fixed(statistics, beta=math.inf).solve(p).weight, mean)


def test_6_finite_beside_infinite(make_features: Callable, make_statistics: Callable) -> None:
    statistics = make_statistics(make_features(LARGE))
    beta = {"a": 0.1, "b": math.inf, "c": 0.0}
    correction = fixed(statistics, beta=beta)
    near = fixed(statistics, beta={**beta, "b": 1e9})
    assert close(correction.solve([1, 1, 1]).weight, near.solve([1, 1, 1]).weight, 1e-5)
    assert close(correction.solve([1, 0, 1]).weight, near.solve([1, 0, 1]).weight)


@SIZES
def test_7_aggregation(make_features: Callable, make_statistics: Callable, sizes: dict) -> None:
    features = make_features(sizes)
    correction = fixed(make_statistics(features))
    p = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    w = correction.solver.weights(p[None])[0]
    fits = [correction.fitted.fit(task) for task in correction.tasks]
    M = sum(x * fit.curvature for x, fit in zip(w, fits, strict=True))
    omega = [x * fit.curvature @ torch.linalg.inv(M) for x, fit in zip(w, fits, strict=True)]
    assert close(sum(omega), torch.eye(6, dtype=torch.float64))
    W = correction.solve(p).weight
    assert close(W, sum(fit.own @ o for fit, o in zip(fits, omega, strict=True)))
    assert close(W, correction.solve(17 * p).weight)
    assert close(W, correction.solve(p + 1e-10).weight, 1e-8)
    other = make_features({**sizes, "b": 9}, seed=5)
    replaced = {**features, "b": other["b"]}
    without = fixed(make_statistics(replaced))
    assert close(without.solve([1, 0, 3]).weight, correction.solve([1, 0, 3]).weight, 1e-14)


@SIZES
def test_8_add_and_remove_give_the_same_map(
    make_features: Callable, make_statistics: Callable, sizes: dict
) -> None:
    features = make_features(sizes)
    statistics = make_statistics(features)
    more = make_statistics(make_features({"a": 11}, seed=7))["a"]
    W = fixed(statistics).solve([1, 1, 1]).weight
    again = {**statistics, "a": (statistics["a"] + more) - more}
    assert close(fixed(again).solve([1, 1, 1]).weight, W)
    stored = {
        task: CorrectionStatistics.from_tensors(s.tensors(), s.metadata)
        for task, s in statistics.items()
    }
    assert torch.equal(fixed(stored).solve([1, 1, 1]).weight, W)


@SIZES
def test_9_invariance_to_size_and_scale(
    make_features: Callable, make_statistics: Callable, sizes: dict
) -> None:
    features = make_features(sizes)
    p = [0.5, 0.2, 0.3]

    def solve(features: dict, **options: object) -> Tensor:
        return fixed(make_statistics(features), **options).solve(p).weight

    W = solve(features)
    copies = {task: (Z.repeat(3, 1), Y.repeat(3, 1)) for task, (Z, Y) in features.items()}
    scaled = {task: (7 * Z, 7 * Y) for task, (Z, Y) in features.items()}
    assert close(solve(copies), W)
    assert close(solve(scaled), W)
    one = {**features, "a": copies["a"]}
    assert close(solve(one), W)
    for mode in ("relative", "per_sample"):
        options = {"beta_mode": mode, "task_scale": "per_sample"}
        assert close(solve(one, **options), solve(features, **options))
    assert not close(solve(one, task_scale="none"), solve(features, task_scale="none"), 1e-3)


def test_10_change_of_basis(make_features: Callable, make_statistics: Callable) -> None:
    features = make_features(LARGE)
    Q1, Q2 = (orthogonal_factor(torch.randn(6, 6, dtype=torch.float64)) for _ in range(2))
    turned = {task: (Z @ Q1.T, Y @ Q2.T) for task, (Z, Y) in features.items()}
    W = fixed(make_statistics(features)).solve([1, 2, 3]).weight
    turned_W = fixed(make_statistics(turned)).solve([1, 2, 3]).weight
    assert close(turned_W, Q2 @ W @ Q1.T)


@SIZES
def test_11_losses_from_statistics(
    make_features: Callable, make_statistics: Callable, sizes: dict
) -> None:
    features = make_features(sizes)
    correction = fixed(make_statistics(features), beta=0.1)
    betas, priors = pieces(correction)
    W = torch.randn(6, 6, dtype=torch.float64)
    for t, task in enumerate(correction.tasks):
        one = ({task: features[task]}, [1.0], [betas[t]], [priors[t]])
        fit = correction.fitted.fit(task)
        best = objective(fit.own, *one)
        assert objective(W, *one) - best == pytest.approx(float(fit.excess(W)), rel=1e-9)


@SIZES
def test_12_a_rising_weight_never_hurts_its_task(
    make_features: Callable, make_statistics: Callable, sizes: dict
) -> None:
    correction = fixed(make_statistics(make_features(sizes)))
    steps = torch.linspace(0, 1, 11, dtype=torch.float64)
    path = torch.stack([steps, 1 - steps, torch.zeros(11)], 1)
    W = correction.solve_many(path).weight
    a, b = correction.fitted.fit("a").excess(W), correction.fitted.fit("b").excess(W)
    assert bool((a.diff() <= 1e-9 * a.max()).all())
    assert bool((b.diff() >= -1e-9 * b.max()).all())
    assert not bool(((a[:, None] < a - 1e-9) & (b[:, None] < b - 1e-9)).any())


@pytest.mark.parametrize("bias", ["none", "shared", "per_task"])
@pytest.mark.parametrize(
    ("sizes", "beta"), [(SMALL, 1e-2), (LARGE, 1e-2), (SMALL, 0.0), (LARGE, math.inf)]
)
def test_13_folded_batched_and_looped_agree(
    make_features: Callable, make_statistics: Callable, sizes: dict, bias: str, beta: float
) -> None:
    features = make_features(sizes, k=5)
    correction = fixed(make_statistics(features), bias=bias, beta=beta, memory_cap=4000)
    heads = {
        "a": (torch.randn(3, 5), torch.randn(3)),
        "c": (torch.randn(7, 5), None),
    }
    P = torch.tensor([[1.0, 1, 1], [0, 0.5, 0.5], [0, 0, 1], [1, 0, 0]])
    for task, (H, c) in heads.items():
        Z = features[task][0]
        weight, offset = correction.fold(P, task, H, c)
        batch = correction.solve_many(P, task)
        for i, p in enumerate(P):
            explicit = correction.solve(p, task)
            logits = explicit(Z) @ H.double().T + (0 if c is None else c)
            assert close(Z @ weight[i].T + offset[i], logits)
            assert close(batch[i].weight, explicit.weight)
            one = correction.fold(p, task, H, c)
            assert close(one[0], weight[i])
            assert close(one[1], offset[i])
            explicit_fold = explicit.fold(H, c)
            assert close(explicit_fold[0], weight[i])
            assert close(explicit_fold[1], offset[i])
        folded = batch.fold(H, c)
        assert close(folded[0], weight)
        assert close(folded[1], offset)
    chunks = list(correction.fold_heads(P, heads))
    assert len(chunks) > 1
    joined = torch.cat([chunk["c"][0] for chunk in chunks])
    assert close(joined, correction.fold(P, "c", *heads["c"])[0])


@SIZES
@pytest.mark.parametrize("beta", BETAS)
def test_14_biases(
    make_features: Callable, make_statistics: Callable, sizes: dict, beta: float
) -> None:
    features = make_features(sizes)
    statistics = make_statistics(features)
    W0 = torch.eye(6, dtype=torch.float64)
    p = [0.5, 0.2, 0.3]
    options = {"beta": beta, "beta_mode": "absolute", "prior": W0, "task_scale": "none"}

    def loss(bias: str) -> float:
        correction = fixed(statistics, bias=bias, **options)
        total = 0.0
        for (task, (Z, Y)), w in zip(features.items(), p, strict=True):
            solved = correction.solve(p, task)
            total += w * float(
                (solved(Z) - Y).square().sum() + beta * (solved.weight - W0).square().sum()
            )
        return total

    assert loss("per_task") <= loss("shared") * (1 + 1e-9)
    assert loss("shared") <= loss("none") * (1 + 1e-9)
    # The shared bias by centring after pooling, as the equations say.
    sums = [w * len(Z) for (Z, _), w in zip(features.values(), p, strict=True)]
    n = sum(sums)
    m = sum(w * Z.sum(0) for (Z, _), w in zip(features.values(), p, strict=True)) / n
    i = sum(w * Y.sum(0) for (_, Y), w in zip(features.values(), p, strict=True)) / n
    N = sum(w * (Y.T @ Z + beta * W0) for (Z, Y), w in zip(features.values(), p, strict=True))
    eye = torch.eye(6, dtype=torch.float64)
    M = sum(w * (Z.T @ Z + beta * eye) for (Z, _), w in zip(features.values(), p, strict=True))
    W = (N - n * torch.outer(i, m)) @ torch.linalg.inv(M - n * torch.outer(m, m))
    solved = fixed(statistics, bias="shared", **options).solve(p)
    assert close(solved.weight, W, 1e-7)
    assert close(solved.bias, i - W @ m, 1e-7)


@pytest.mark.parametrize("bias", ["none", "shared", "per_task"])
def test_1_one_hot_for_every_bias(
    make_features: Callable, make_statistics: Callable, bias: str
) -> None:
    features = make_features(LARGE)
    correction = fixed(make_statistics(features), bias=bias)
    Z, Y = features["b"]
    if bias != "none":
        Z, Y = Z - Z.mean(0), Y - Y.mean(0)
    A, G = Y.T @ Z, Z.T @ Z
    W = dual_ridge(Z.T, Y.T, orthogonal_factor(A), 0.01 * float(G.trace()) / 6)
    solved = correction.solve({"b": 1.0})
    assert close(solved.weight, W)
    if bias != "none":
        Z, Y = features["b"]
        assert close(solved.bias, Y.mean(0) - W @ Z.mean(0))


def test_per_task_bias_needs_to_know_whose(
    make_features: Callable, make_statistics: Callable
) -> None:
    correction = fixed(make_statistics(make_features(LARGE)), bias="per_task")
    with pytest.raises(ValueError, match="say whose"):
        correction.solve([1, 1, 0])
    with pytest.raises(KeyError, match="unknown task 'x'"):
        correction.solve([1, 1, 0], task="x")


def test_paper_is_the_published_formula(make_features: Callable, make_statistics: Callable) -> None:
    features = make_features(LARGE)
    N, M = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
    for (Z, Y), p in zip(features.values(), [0.5, 0.2, 0.3], strict=True):
        U, _, Vh = torch.linalg.svd(Y.T @ Z)
        C = Z.T @ Z + 0.1 * torch.eye(6, dtype=torch.float64)
        W = (Y.T @ Z + 0.1 * U @ Vh) @ torch.linalg.inv(C)
        N, M = N + p * W @ C, M + p * C
    solved = ClosedFormCorrection.paper(make_statistics(features)).solve([0.5, 0.2, 0.3])
    assert close(solved.weight, N @ torch.linalg.inv(M))


def test_conditioning_bound(make_features: Callable, make_statistics: Callable) -> None:
    correction = fixed(make_statistics(make_features(SMALL)), beta=1e-3)
    for task in correction.tasks:
        assert correction.fitted.fit(task).condition <= 1 + 6 / 1e-3


def test_unequal_widths_of_tasks(make_features: Callable, make_statistics: Callable) -> None:
    features = make_features({"a": 20}) | make_features({"b": 20}, k=4)
    correction = fixed(make_statistics(features))
    assert correction.solve({"a": 1.0}).weight.shape == (6, 6)
    assert correction.solve({"b": 1.0}).weight.shape == (4, 6)
    with pytest.raises(ValueError, match="different expert widths"):
        correction.solve([1, 1])


def test_empty_tasks(make_features: Callable, make_statistics: Callable) -> None:
    statistics = make_statistics(make_features({"a": 20}))
    statistics["b"] = CorrectionStatistics(6, 6)
    correction = fixed(statistics)
    correction.solve({"a": 1.0})
    with pytest.raises(ValueError, match="'b' has a positive preference but no calibration"):
        correction.solve([1, 1])


def test_scales_that_do_not_exist(make_features: Callable, make_statistics: Callable) -> None:
    Z = make_features({"a": 20})["a"][0]
    same = make_statistics({"a": (Z, Z)})
    with pytest.raises(ValueError, match="nothing to recover"):
        fixed(same, task_scale="per_gap").solve([1])
    constant = make_statistics({"a": (Z, torch.ones_like(Z))})
    with pytest.raises(ValueError, match="no energy"):
        fixed(constant, bias="per_task", prior="identity").solve([1])
    with pytest.raises(ValueError, match="finite beta"):
        fixed(same, task_scale="per_gap", beta=math.inf).solve([1])
    with pytest.raises(ValueError, match="finite beta"):
        fixed(same, scalarization="chebyshev", beta=math.inf).solve([1])


def test_per_gap_of_unequal_widths(make_features: Callable, make_statistics: Callable) -> None:
    statistics = make_statistics(make_features(LARGE, k=4))
    correction = fixed(statistics, task_scale="per_gap")
    equal = fixed(statistics).solve([1, 1, 1]).weight
    for task in LARGE:
        gap = float(correction.fitted.fit(task).excess(equal))
        assert correction.fitted.scale(task) == pytest.approx(1 / gap)


def test_nothing_to_align(make_features: Callable, make_statistics: Callable) -> None:
    Z = make_features({"a": 20})["a"][0]
    correction = fixed(make_statistics({"a": (Z, 0 * Z)}))
    with pytest.raises(ValueError, match=r"'a': .*nothing to align"):
        correction.solve({"a": 1.0})


def test_bad_options(make_features: Callable, make_statistics: Callable) -> None:
    statistics = make_statistics(make_features(LARGE))
    for beta in (-1.0, math.nan):
        with pytest.raises(ValueError, match="beta="):
            fixed(statistics, beta=beta)
    with pytest.raises(ValueError, match="anchor="):
        fixed(statistics, anchor=-1.0)
    with pytest.raises(ValueError, match="one for each"):
        fixed(statistics, beta={"a": 1.0})
    with pytest.raises(ValueError, match="at least one task"):
        fixed({})
    with pytest.raises(ValueError, match="given prior has shape"):
        fixed(statistics, prior=torch.eye(3)).solve([1, 0, 0])
    narrow = make_statistics(make_features({"a": 9}, k=4))
    with pytest.raises(ValueError, match="equal widths"):
        fixed(narrow, prior="identity").solve([1])
    other = CorrectionStatistics(6, 6, fingerprint="other")
    with pytest.raises(ValueError, match="fingerprint"):
        fixed({**statistics, "d": other})
    correction = fixed(statistics)
    with pytest.raises(ValueError, match="head of 'a'"):
        correction.fold([1, 1, 1], "a", torch.ones(2, 5), None)
    with pytest.raises(KeyError, match="unknown tasks"):
        correction.fold([1, 1, 1], "x", torch.ones(2, 6), None)


def test_linear_map_is_row_major() -> None:
    from lightning_merge.correction import LinearMap

    W, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    Z = torch.randn(5, 4)
    out = LinearMap(W, b)(Z)
    assert out.dtype == torch.float32
    assert torch.allclose(out, (Z.double() @ W.T + b).float(), atol=1e-5)
    batch = LinearMap(torch.stack([W, 2 * W]), torch.stack([b, b]))
    assert batch(Z).shape == (2, 5, 3)
    assert len(batch) == 2
    assert torch.equal(batch[1].weight, 2 * W)
    with pytest.raises(TypeError, match="single map"):
        LinearMap(W)[0]
    with pytest.raises(TypeError, match="no length"):
        len(LinearMap(W))
