import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_merge.functional.isotropic import iso_c, iso_cts, task_rank
from lightning_merge.methods import IsoC, IsoCTS
from tests.methods.models import models
from tests.methods.test_tsv import SIZES, random_matrices


def polar(matrix):
    u, _, vh = np.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def reference_cts(vectors, fraction):
    """Iso-CTS as the paper writes it, with the common width that lets the tasks share the rest."""
    vectors = np.asarray(vectors, np.float64)
    num, size = len(vectors), min(vectors.shape[1:])
    own = min(round((size - int(size * fraction)) / num), size // num)
    width = size - own * num
    u, s, vh = np.linalg.svd(vectors.sum(axis=0), full_matrices=False)
    common = u[:, :width], s[:width], vh[:width]
    parts = []
    for vector in vectors:
        a, b, c = np.linalg.svd(vector - common[0] @ (common[0].T @ vector), full_matrices=False)
        parts.append((a[:, :own], b[:own], c[:own]))
    left, values, right = zip(*parts, common, strict=True)
    mean = np.concatenate(values).mean()
    return mean * polar(np.concatenate(left, axis=1)) @ polar(np.concatenate(right))


@given(**SIZES, seed=st.integers(0, 99))
def test_iso_c_against_numpy(num, m, n, seed):
    vectors = random_matrices(num, m, n, seed)
    u, s, vh = np.linalg.svd(vectors.double().sum(0).numpy(), full_matrices=False)
    found = iso_c(vectors)
    np.testing.assert_allclose(found, s.mean() * u @ vh, atol=1e-5)
    np.testing.assert_allclose(np.linalg.svd(found.numpy())[1], s.mean(), rtol=1e-5)


def test_iso_c_of_a_low_rank_sum_is_stable():
    vectors = random_matrices(2, 20, 2, 0) @ random_matrices(2, 2, 15, 1)
    merged = iso_c(vectors)
    values = np.linalg.svd(merged.numpy())[1]
    np.testing.assert_allclose(values[:4], values[0])
    np.testing.assert_allclose(values[4:], 0, atol=1e-9)
    nuclear = np.linalg.svd(vectors.double().sum(0).numpy())[1].sum()
    assert values.sum() == pytest.approx(nuclear, rel=1e-5)
    jitter = 1e-7 * random_matrices(2, 20, 15, 2)
    torch.testing.assert_close(iso_c(vectors + jitter), merged, atol=1e-4, rtol=0)
    assert not iso_c(torch.zeros(2, 4, 3)).any()


@given(**SIZES, seed=st.integers(0, 99), fraction=st.sampled_from([0.0, 0.3, 0.8, 1.0]))
def test_iso_cts_against_numpy(num, m, n, seed, fraction):
    vectors = random_matrices(num, m, n, seed)
    if task_rank(min(m, n), num, fraction) * num == min(m, n) and num == 1:
        return  # nothing is common: the rest is the task vector itself, as below
    found = iso_cts(vectors, fraction)
    np.testing.assert_allclose(found, reference_cts(vectors, fraction), atol=1e-4)


def live(matrix, rank):
    """Leading singular triplets without those of rounding, by NumPy."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    rank = min(rank, int((s > 1e-5 * s[0]).sum()))
    return u[:, :rank], s[:rank], vh[:rank]


def white(columns):
    """Orthonormal columns nearest to these, on their range."""
    u, s, vh = np.linalg.svd(columns, full_matrices=False)
    rank = int((s > 1e-6 * s[0]).sum())
    return u[:, :rank] @ vh[:rank]


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize("what", ["low rank", "one low rank", "duplicates"])
def test_iso_cts_where_little_lies_outside_the_common_space(shape, what):
    vectors = random_matrices(3, *shape, 0).double()
    low = random_matrices(3, shape[0], 2, 1).double() @ random_matrices(3, 2, shape[1], 2).double()
    if what == "low rank":
        vectors = low
    elif what == "one low rank":
        vectors[0] = low[0]
    else:
        vectors[1] = vectors[2] = vectors[0]
    own = task_rank(24, 3, 0.5)
    common = live(vectors.sum(0).numpy(), 24 - 3 * own)
    parts = []
    for vector in vectors.numpy():
        rest = vector - common[0] @ (common[0].T @ vector)
        if np.linalg.norm(rest) > 1e-5 * np.linalg.norm(vector):
            parts.append(live(rest, own))
    left, values, right = zip(*parts, common, strict=True)
    left, right = white(np.concatenate(left, axis=1)), white(np.concatenate(right).T).T
    expected = np.concatenate(values).mean() * left @ right
    np.testing.assert_allclose(iso_cts(vectors, 0.5), expected, atol=1e-6)


@given(**SIZES, seed=st.integers(0, 99))
def test_all_common_is_iso_c(num, m, n, seed):
    vectors = random_matrices(num, m, n, seed)
    assert torch.equal(iso_cts(vectors, 1.0), iso_c(vectors))


def test_one_task_of_its_own_is_iso_c():
    vectors = random_matrices(1, 6, 9, 0)
    torch.testing.assert_close(iso_cts(vectors, 0.0), iso_c(vectors))
    assert not iso_cts(torch.zeros(2, 6, 9), 0.5).any()


@pytest.mark.parametrize(("size", "num", "fraction"), [(50, 20, 0.8), (30, 20, 0.0), (3, 5, 0.2)])
def test_widths_always_fit(size, num, fraction):
    own = task_rank(size, num, fraction)
    assert 0 <= own * num <= size
    vectors = random_matrices(num, size, size + 1, 0)
    assert torch.isfinite(iso_cts(vectors, fraction)).all()


@pytest.mark.parametrize("method", [IsoC(scale=0.6), IsoCTS(scale=0.6, common_fraction=0.5)])
def test_methods_average_what_is_no_matrix(method):
    base, experts = models(2)
    merged = method.merge(base, experts)
    for name, value in base.items():
        rows = torch.stack([e[name] - value for e in experts.values()]).double()
        update = rows.mean(0)
        if name == "fc.weight":
            update = iso_c(rows) if isinstance(method, IsoC) else iso_cts(rows, 0.5)
        expected = value + 0.6 * update
        np.testing.assert_allclose(merged[name], expected, atol=1e-6)
    kernel = type(method)(**{**vars(method), "convolutions": "matrix"}).merge(base, experts)
    assert not torch.equal(kernel["conv.weight"], merged["conv.weight"])


@pytest.mark.parametrize("bad", [{"common_fraction": 1.2}, {"rank_tol": -1.0}, {"rcond": 2.0}])
def test_errors(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        IsoCTS(**bad)


def test_parameters_side_by_side_give_the_same():
    base, experts = models(3, shapes={f"{i}.weight": (12 + i, 9) for i in range(7)})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = IsoC().merge(base, experts)
        torch.set_num_threads(2)
        together = IsoC().merge(base, experts)
    finally:
        torch.set_num_threads(before)
    assert list(together) == list(base)
    assert all(torch.equal(alone[name], together[name]) for name in base)
