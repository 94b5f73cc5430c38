import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_merge.functional.spectral import Factors
from lightning_merge.functional.tsv import overlap, truncated_factors, tsv_merge
from lightning_merge.methods import TSVMerge
from tests.methods.models import models


def reference(task_vectors, rank):
    """TSV-Merge as the paper writes it: full decompositions, the polar factor by another one."""
    parts = [
        np.linalg.svd(np.asarray(row, np.float64), full_matrices=False) for row in task_vectors
    ]
    left = np.concatenate([u[:, :rank] for u, _, _ in parts], axis=1)
    values = np.concatenate([s[:rank] for _, s, _ in parts])
    right = np.concatenate([v[:rank] for _, _, v in parts])
    polars = []
    for joint in (left, right):
        p, _, q = np.linalg.svd(joint, full_matrices=False)
        polars.append(p @ q)
    return polars[0] * values @ polars[1]


def random_matrices(num, m, n, seed):
    return torch.randn(num, m, n, generator=torch.Generator().manual_seed(seed))


SIZES = {"num": st.integers(1, 4), "m": st.integers(4, 12), "n": st.integers(4, 12)}


@given(**SIZES, seed=st.integers(0, 99))
def test_against_numpy(num, m, n, seed):
    vectors = random_matrices(num, m, n, seed)
    rank = min(m, n) // num
    found = tsv_merge(vectors, rank)
    np.testing.assert_allclose(found, reference(vectors, rank), atol=1e-5)
    # its singular values are those that were kept, so its norm follows
    kept = np.sort([s for v in vectors for s in np.linalg.svd(v.double().numpy())[1][:rank]])[::-1]
    np.testing.assert_allclose(np.linalg.svd(found.numpy())[1][: len(kept)], kept, rtol=1e-5)


@given(**SIZES, seed=st.integers(0, 99))
def test_symmetries(num, m, n, seed):
    vectors = random_matrices(num, m, n, seed).double()
    rank = min(m, n) // num
    merged = tsv_merge(vectors, rank)
    close = {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(tsv_merge(vectors.flip(0), rank), merged, **close)
    torch.testing.assert_close(tsv_merge(3 * vectors, rank), 3 * merged, **close)
    torch.testing.assert_close(tsv_merge(vectors.transpose(1, 2), rank), merged.t(), **close)
    q, r = (torch.linalg.qr(random_matrices(1, s, s, seed)[0].double())[0] for s in (m, n))
    torch.testing.assert_close(tsv_merge(q @ vectors @ r, rank), q @ merged @ r, **close)


@given(copies=st.integers(2, 6), seed=st.integers(0, 99))
def test_identical_tasks_give_their_truncation(copies, seed):
    one = random_matrices(1, 12, 15, seed)
    found = tsv_merge(one.expand(copies, -1, -1), 12 // copies)
    u, s, vh = np.linalg.svd(one[0].double().numpy(), full_matrices=False)
    k = 12 // copies
    np.testing.assert_allclose(found, (u[:, :k] * s[:k]) @ vh[:k], atol=1e-6)


def test_null_directions_of_low_rank_updates_do_not_count():
    left, right = random_matrices(3, 20, 2, 0), random_matrices(3, 2, 16, 1)
    vectors = left @ right
    merged = tsv_merge(vectors, 16 // 3)  # five directions a task, of which two exist
    np.testing.assert_allclose(merged, reference(vectors, 2), atol=1e-5)
    jitter = 1e-7 * random_matrices(3, 20, 16, 2)
    torch.testing.assert_close(tsv_merge(vectors + jitter, 5), merged, atol=1e-4, rtol=0)


def test_orthogonal_tasks_add_up_without_interference():
    eye = torch.eye(12)
    vectors = torch.stack([eye[:, [i]] * (i + 1) @ eye[[i]] for i in range(3)])
    torch.testing.assert_close(tsv_merge(vectors, 4).float(), vectors.sum(0))
    assert overlap(truncated_factors(vectors, 4)) == pytest.approx((0, 1), abs=1e-9)
    same = vectors[:1].expand(3, -1, -1)
    found = overlap(truncated_factors(same, 1))
    assert found.interference == pytest.approx(12)  # J + I
    assert found.condition > 1e7  # one direction three times


def test_interference_equation():
    factors = truncated_factors(random_matrices(3, 7, 9, 0), 2)
    left = np.concatenate([f.left for f in factors], axis=1)
    values = np.concatenate([f.values for f in factors])
    right = np.concatenate([f.right for f in factors])
    eye = np.eye(6)
    expected = np.abs((left.T @ left - eye) @ np.diag(values) @ (right @ right.T - eye)).sum()
    found = overlap(factors)
    assert found.interference == pytest.approx(expected)
    assert found.condition == pytest.approx(max(np.linalg.cond(left), np.linalg.cond(right)))
    assert overlap(truncated_factors(torch.zeros(2, 4, 5), 2)) == (0.0, 1.0)


def test_zero_updates_contribute_nothing():
    vectors = random_matrices(3, 8, 9, 0)
    vectors[1] = 0
    np.testing.assert_allclose(tsv_merge(vectors, 2), reference(vectors[[0, 2]], 2), atol=1e-6)
    assert not tsv_merge(torch.zeros(2, 4, 5), 2).any()


def test_method_against_numpy_conv_bias_and_fallback():
    base, experts = models(3)
    merged = TSVMerge(scale=0.7).merge(base, experts)
    for name, value in base.items():
        rows = np.stack([np.asarray(e[name] - value, np.float64) for e in experts.values()])
        update = reference(rows, 5 // 3) if name == "fc.weight" else rows.mean(axis=0)
        np.testing.assert_allclose(merged[name], np.asarray(value) + 0.7 * update, atol=2e-6)


def test_kernels_as_matrices_and_split_rows():
    base, experts = models(2, shapes={"conv.weight": (6, 2, 2, 2), "qkv.weight": (12, 5)})
    merged = TSVMerge(convolutions="matrix", split={"qkv.*": 3}).merge(base, experts)
    rows = [
        np.asarray(e["conv.weight"] - base["conv.weight"]).reshape(6, 8) for e in experts.values()
    ]
    expected = np.asarray(base["conv.weight"]).reshape(6, 8) + reference(rows, 3)
    np.testing.assert_allclose(merged["conv.weight"].reshape(6, 8), expected, atol=2e-6)
    for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
        rows = [np.asarray(e["qkv.weight"] - base["qkv.weight"])[part] for e in experts.values()]
        expected = np.asarray(base["qkv.weight"])[part] + reference(rows, 2)
        np.testing.assert_allclose(merged["qkv.weight"][part], expected, atol=2e-6)
    with pytest.raises(ValueError, match="12 rows, which do not divide into 5 parts"):
        TSVMerge(split={"qkv.*": 5}).merge(base, experts)


def test_one_expert_is_returned():
    base, experts = models(1)
    merged = TSVMerge().merge(base, experts)
    for name in base:
        torch.testing.assert_close(merged[name], experts["task0"][name], rtol=1e-6, atol=1e-6)


def test_more_experts_than_directions_fall_back_to_the_mean():
    base, experts = models(6, shapes={"w": (4, 9)})
    with pytest.warns(UserWarning, match=r"1 matrices have fewer.* 6 experts.*get the mean: w"):
        merged = TSVMerge().merge(base, experts)
    mean = torch.stack([e["w"] for e in experts.values()]).mean(0)
    torch.testing.assert_close(merged["w"], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [49, 98, 196])
def test_rank_is_integer_arithmetic(size):
    # int(49 * (1 / 49)) is 0
    assert TSVMerge().rank_of(size, 49) == size // 49


def test_rank_policies():
    assert TSVMerge(rank=3).rank_of(20, 4) == 3
    assert TSVMerge(rank=9).rank_of(20, 4) == 5
    assert TSVMerge(rank_fraction=0.1).rank_of(20, 4) == 2
    vectors = torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.1])).expand(1, 4, 4)
    kept = truncated_factors(vectors, 4, energy=0.9)
    np.testing.assert_allclose(kept[0].values, [3.0, 1.0])
    base, experts = models(3, shapes={"w": (6, 6)})
    with pytest.warns(UserWarning, match="rank_fraction 0.5 times 3 experts"):
        TSVMerge(rank_fraction=0.5).merge(base, experts)


def test_a_rank_that_does_not_fit_is_a_warning_that_names_the_matrices(recwarn):
    base, experts = models(3, shapes={"large": (30, 30), "small": (6, 9), "fused": (12, 9)})
    with pytest.warns(UserWarning, match=r"rank 3 is more than .* of 2 matrices.*: fused, small\."):
        capped = TSVMerge(rank=3, split={"fused": 2}).merge(base, experts)
    with pytest.warns(UserWarning, match="rank 99 is more than"):
        whole = TSVMerge(rank=99).merge(base, experts)
    recwarn.clear()
    paper = TSVMerge().merge(base, experts)
    TSVMerge(rank=2).merge(base, experts)
    assert not recwarn.list
    assert torch.equal(capped["small"], paper["small"])
    assert torch.equal(whole["large"], paper["large"])


@pytest.mark.parametrize(
    "bad",
    [
        {"rank": 0},
        {"rank_fraction": 1.5},
        {"energy": 0.0},
        {"rank_tol": -1.0},
        {"split": {"a": 0}},
        {"shrinkage": -1.0},
        {"rank": 2, "rank_fraction": 0.1},
    ],
)
def test_errors(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TSVMerge(**bad)


def test_factors_product():
    factors = Factors(torch.eye(3)[:, :2], torch.tensor([2.0, 1.0]), torch.eye(4)[:2])
    assert factors.product().diag().tolist() == [2.0, 1.0, 0.0]
    assert factors.truncated(1).product().diag().tolist() == [2.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", [(96, 96), (160, 64), (64, 160)])
def test_float32_task_vectors_merge_as_in_float64(shape):
    # singular value decompositions in float32 are off by 4e-5 and more
    vectors = random_matrices(4, *shape, seed=5)
    found, exact = tsv_merge(vectors, 16).numpy(), reference(vectors, 16)
    assert np.linalg.norm(found - exact) <= 1e-6 * np.linalg.norm(exact)
