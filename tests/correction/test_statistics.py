import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_merge.correction import CorrectionStatistics
from lightning_merge.functional.sums import fold_of


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same(a: CorrectionStatistics, b: CorrectionStatistics, tolerance: float = 1e-12) -> bool:
    x, y = a.tensors(), b.tensors()
    return all(
        torch.equal(x[name], y[name])
        if not x[name].is_floating_point()
        else float((x[name] - y[name]).abs().max())
        <= tolerance * max(1.0, float(x[name].abs().max()))
        for name in x
    )


def test_moments_are_the_sums() -> None:
    Z, Y = normal(23, 4), normal(23, 3, seed=1)
    statistics = CorrectionStatistics(4, 3)
    statistics.update(Z, Y)
    total = statistics.total()
    assert torch.allclose(total.gram, Z.T @ Z)
    assert torch.allclose(total.cross, Y.T @ Z)
    assert torch.allclose(total.expert_gram, Y.T @ Y)
    assert torch.allclose(total.sum_merged, Z.sum(0))
    assert torch.allclose(total.sum_expert, Y.sum(0))
    assert total.energy == pytest.approx(float(Y.square().sum()))
    assert (statistics.count, total.n, statistics.effective_count) == (23, 23.0, 23.0)
    folds = statistics.folds()
    assert len(folds) == 5
    chosen = fold_of(torch.arange(23), 5) == 2
    assert torch.allclose(folds[2].cross, Y[chosen].T @ Z[chosen])


def test_errors_of_a_map_from_moments() -> None:
    Z, Y = normal(9, 4), normal(9, 3, seed=1)
    W, b, H = normal(3, 4, seed=2), normal(3, seed=3), normal(2, 3, seed=4)
    statistics = CorrectionStatistics(4, 3)
    statistics.update(Z, Y)
    total = statistics.total()
    residual = Z @ W.T - Y
    assert total.error(W) == pytest.approx(float(residual.square().sum()))
    assert total.error(W, b) == pytest.approx(float((residual + b).square().sum()))
    read = total.read_by(H)
    assert read.error(H @ W, H @ b) == pytest.approx(float(((residual + b) @ H.T).square().sum()))
    centred = total.centred()
    expected = (Z - Z.mean(0)) @ W.T - (Y - Y.mean(0))
    assert centred.error(W) == pytest.approx(float(expected.square().sum()))
    assert torch.allclose(centred.expert_gram, (Y - Y.mean(0)).T @ (Y - Y.mean(0)))


@settings(deadline=None, max_examples=20)
@given(cuts=st.lists(st.integers(0, 31), max_size=4), order=st.permutations(range(31)))
def test_batches_order_and_ranks_change_nothing(cuts: list[int], order: list[int]) -> None:
    Z, Y = normal(31, 3), normal(31, 3, seed=1)
    whole = CorrectionStatistics(3, 3)
    whole.update(Z, Y)
    index = torch.tensor(order)
    ranks = []
    edges = sorted({0, *cuts, 31})
    for start, stop in itertools.pairwise(edges):
        part = CorrectionStatistics(3, 3)
        rows = index[start:stop]
        part.update(Z[rows], Y[rows], indices=rows)
        ranks.append(part)
    summed = ranks[0]
    for part in ranks[1:]:
        summed = summed + part
    assert same(whole, summed)


def test_default_indices_are_a_running_count() -> None:
    Z = normal(17, 3)
    one, two = CorrectionStatistics(3, 3), CorrectionStatistics(3, 3)
    one.update(Z, Z)
    two.update(Z[:6], Z[:6])
    two.update(Z[6:], Z[6:])
    assert same(one, two)


def test_remove_restores_and_refuses() -> None:
    Z, Y = normal(40, 3, seed=3), normal(40, 3, seed=4)
    a, b = CorrectionStatistics(3, 3), CorrectionStatistics(3, 3)
    a.update(Z[:25], Y[:25])
    b.update(Z[25:], Y[25:], indices=torch.arange(25, 40))
    assert same((a + b) - b, a)
    emptied = (a + b) - (a + b)
    assert emptied.count == 0
    assert float(emptied.total().gram.abs().max()) == 0.0
    with pytest.raises(ValueError, match="sample counts"):
        a - (a + b)
    other = CorrectionStatistics(3, 3)
    other.update(5 * Z[:10], Y[:10])
    with pytest.raises(ValueError, match="second moments"):
        a - other


def test_other_kinds_do_not_add() -> None:
    a = CorrectionStatistics(3, 3, fingerprint="x")
    for other in (
        CorrectionStatistics(3, 4, fingerprint="x"),
        CorrectionStatistics(3, 3, fingerprint="y"),
        CorrectionStatistics(3, 3, fingerprint="x", feature_norm="l2"),
        CorrectionStatistics(3, 3, fingerprint="x", num_folds=3),
    ):
        with pytest.raises(ValueError, match="different kinds"):
            a + other


def test_round_trip_and_reduce() -> None:
    a = CorrectionStatistics(4, 3, feature_norm="l2", fingerprint="f", num_folds=3)
    a.update(normal(11, 4), normal(11, 3, seed=1))
    b = CorrectionStatistics.from_tensors(a.tensors(), a.metadata)
    assert same(a, b, 0.0)
    assert b.metadata == {"feature_norm": "l2", "fingerprint": "f"}
    assert same(a + b, a.all_reduced(lambda value: 2 * value), 0.0)
    assert all(value.dtype in (torch.int64, torch.float64) for value in a.tensors().values())
    pooled = CorrectionStatistics(2, 2, num_folds=None)
    pooled.update(normal(5, 2), normal(5, 2))
    assert CorrectionStatistics.from_tensors(pooled.tensors()).num_folds == 1


def test_damaged_tensors_are_refused() -> None:
    tensors = CorrectionStatistics(4, 3).tensors()
    with pytest.raises(ValueError, match=r"lack \['gram'\]"):
        CorrectionStatistics.from_tensors({k: v for k, v in tensors.items() if k != "gram"})
    with pytest.raises(ValueError, match="'gram' is"):
        CorrectionStatistics.from_tensors({**tensors, "gram": tensors["gram"].float()})


def test_half_precision_features_are_summed_in_float64() -> None:
    Z = normal(9, 3, dtype=torch.float32).to(torch.bfloat16)
    statistics = CorrectionStatistics(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        statistics.update(Z, Z)
    exact = Z.double().T @ Z.double()
    assert torch.allclose(statistics.total().gram, exact, rtol=1e-14)


def test_inference_mode_leaves_ordinary_tensors() -> None:
    with torch.inference_mode():
        statistics = CorrectionStatistics(3, 3)
        statistics.update(normal(4, 3), normal(4, 3))
    statistics.update(normal(4, 3), normal(4, 3))
    assert statistics.count == 8


def test_l2_norm_and_weights() -> None:
    Z, Y = normal(6, 3), normal(6, 3, seed=1)
    a, b = (CorrectionStatistics(3, 3, feature_norm="l2") for _ in range(2))
    a.update(Z, Y)
    b.update(7 * Z, 0.1 * Y)
    assert same(a, b)
    assert a.total().energy == pytest.approx(6.0)
    c, repeated = CorrectionStatistics(3, 3), CorrectionStatistics(3, 3)
    c.update(Z, Y, weights=torch.tensor([2.0, 1, 1, 1, 1, 0]))
    repeated.update(torch.cat([Z[:5], Z[:1]]), torch.cat([Y[:5], Y[:1]]))
    assert torch.allclose(c.total().cross, repeated.total().cross)
    assert c.effective_count == pytest.approx(36 / 8)


def test_nonfinite_features() -> None:
    Z = normal(6, 3)
    bad = Z.clone()
    bad[2, 1], bad[4, 0] = torch.nan, torch.inf
    statistics = CorrectionStatistics(3, 3)
    statistics.update(Z, Z)
    before = statistics.tensors()
    with pytest.raises(ValueError, match="batch 1: 2 of 6 rows"):
        statistics.update(bad, Z)
    assert all(torch.equal(before[name], value) for name, value in statistics.tensors().items())
    skipping = CorrectionStatistics(3, 3, on_nonfinite="skip")
    skipping.update(bad, Z)
    assert (skipping.count, skipping.skipped) == (4, 2)
    keep = [0, 1, 3, 5]
    assert torch.allclose(skipping.total().gram, Z[keep].T @ Z[keep])


def test_bad_shapes_and_types() -> None:
    statistics = CorrectionStatistics(4, 3)
    Z, Y = normal(5, 4), normal(5, 3)
    with pytest.raises(ValueError, match=r"\(5, 4\).*\(4, 3\)"):
        statistics.update(Z, Y[:4])
    with pytest.raises(ValueError, match=r"expert features have shape \(5, 4\)"):
        statistics.update(Z, Z)
    with pytest.raises(ValueError, match="token grids"):
        statistics.update(Z[None], Y)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match="floating"):
            statistics.update(Z.to(dtype), Y)
    with pytest.raises(ValueError, match="indices"):
        statistics.update(Z, Y, indices=torch.arange(4))
    with pytest.raises(ValueError, match="sample weights"):
        statistics.update(Z, Y, weights=-torch.ones(5))
    with pytest.raises(ValueError, match="num_folds=1"):
        CorrectionStatistics(3, 3, num_folds=1)
    with pytest.raises(ValueError, match="widths"):
        CorrectionStatistics(0, 3)


@settings(deadline=None, max_examples=20)
@given(n=st.integers(0, 200), folds=st.integers(2, 9))
def test_folds_are_balanced_and_mixed(n: int, folds: int) -> None:
    fold = fold_of(torch.arange(n), folds)
    counts = torch.bincount(fold, minlength=folds)
    assert int(counts.max() - counts.min()) <= 1
    # A set of `folds` classes in turn is not split by class.
    period = fold_of(torch.arange(0, 100 * folds, folds), folds)
    assert len(torch.unique(period)) == folds


def test_fold_hash_is_fixed_for_ever() -> None:
    big = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10**6, 2**40 + 3, 2**62])
    expected = [(i % 5 + _rotation(i // 5)) % 5 for i in big.tolist()]
    assert fold_of(big, 5).tolist() == expected


def _rotation(block: int, folds: int = 5) -> int:
    mask = 2**64 - 1
    h = block * 0x9E3779B97F4A7C15 & mask
    h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & mask
    h = (h ^ h >> 27) * 0x94D049BB133111EB & mask
    h ^= h >> 31
    return (h & 2**63 - 1) % folds
