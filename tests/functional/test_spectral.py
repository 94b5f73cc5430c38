import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_merge.functional import spectral
from lightning_merge.functional.parallel import map_on_cores
from lightning_merge.functional.spectral import inverse_root, leading_triplets, polar_and_values


def with_spectrum(values, m, n, seed=0):
    rng = np.random.default_rng(seed)
    k = len(values)
    u, v = (np.linalg.qr(rng.normal(size=(size, k)))[0] for size in (m, n))
    return torch.tensor(u * np.asarray(values) @ v.T)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@given(m=st.integers(1, 9), n=st.integers(1, 9), rank=st.integers(1, 9), seed=st.integers(0, 99))
def test_best_approximation_of_its_rank(m, n, rank, seed):
    matrix = torch.tensor(np.random.default_rng(seed).normal(size=(m, n)))
    rank = min(rank, m, n)
    factors = leading_triplets(matrix, rank)
    u, s, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    np.testing.assert_allclose(factors.values, s[:rank], rtol=1e-8)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    np.testing.assert_allclose(factors.product(), best, atol=1e-7)
    eye = np.eye(rank)
    np.testing.assert_allclose(factors.left.T @ factors.left, eye, atol=1e-6)
    np.testing.assert_allclose(factors.right @ factors.right.T, eye, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize(("size", "rank"), [(256, 20), (301, 60)])
def test_refined_pairs_are_those_of_a_float64_decomposition(decay, size, rank):
    rows = torch.randn(size + 9, size, dtype=torch.float64, generator=seeded(size))
    gram = with_spectrum(np.arange(1.0, size + 1) ** -decay, size + 9, size) + 1e-3 * rows
    gram = gram.T @ gram
    values, vectors = spectral._refined(gram, rank)
    expected = torch.linalg.eigh(gram)
    torch.testing.assert_close(values, expected.eigenvalues.flip(0)[:rank], rtol=1e-12, atol=0)
    # of the subspace: float32 alone is off by 1e-6 and more
    lead = expected.eigenvectors.flip(1)[:, :rank]
    assert (lead - vectors @ (vectors.T @ lead)).abs().max() < 1e-9
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(rank).double(), rtol=0, atol=1e-12)


def test_what_float32_cannot_see_is_left_to_float64():
    steep = with_spectrum(np.arange(1.0, 301) ** -3.0, 400, 300)
    gram = steep.T @ steep
    assert spectral._refined(gram, 60) is None
    assert spectral._refined(torch.zeros(300, 300, dtype=torch.float64), 60) is None
    found = leading_triplets(steep, 30)
    torch.testing.assert_close(found.values, torch.arange(1.0, 31).double() ** -3.0)


def test_gram_matrix_in_blocks():
    for size in (1, spectral.COLUMNS, 2 * spectral.COLUMNS + 3):
        columns = torch.randn(7, size, dtype=torch.float64, generator=seeded(size))
        torch.testing.assert_close(spectral.gram(columns), columns.T @ columns)


def test_a_single_wrong_entry_is_seen():
    columns = torch.linalg.qr(torch.randn(60, 40, dtype=torch.float64, generator=seeded(0)))[0]
    assert spectral.is_orthonormal(columns)
    columns[:, 7] += 1e-5 * columns[:, 3]
    assert not spectral.is_orthonormal(columns)
    assert spectral.is_orthonormal(columns[:, :0])


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20)])
def test_null_directions_are_left_out(shape):
    matrix = with_spectrum([3.0, 2.0], *shape)
    factors = leading_triplets(matrix, 10)
    assert len(factors.values) == 2
    torch.testing.assert_close(factors.product(), matrix)
    assert len(leading_triplets(torch.zeros(shape), 5).values) == 0


def test_small_directions_fall_back_to_a_full_decomposition():
    values = [1.0, 1e-3, 1e-6, 1e-8]  # squared, the last are below the resolution of float64
    matrix = with_spectrum(values, 30, 20)
    factors = leading_triplets(matrix, 4, rank_tol=1e-10)
    np.testing.assert_allclose(factors.values, values, rtol=1e-6)
    torch.testing.assert_close(factors.left.T @ factors.left, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("smallest", [1e-3, 1e-5])
def test_small_directions_need_no_full_decomposition(smallest, monkeypatch):
    monkeypatch.setattr(spectral, "_by_svd", None)
    spectrum = np.r_[np.linspace(1, 0.1, 36), 0.009, 0.0007 if smallest < 7e-4 else 0.005, smallest]
    matrix = with_spectrum(spectrum, 50, len(spectrum))
    u, s, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    polar, values = spectral.polar_and_values(matrix, 1e-7)
    np.testing.assert_allclose(polar, u @ vh, atol=1e-8)
    np.testing.assert_allclose(values, s, rtol=1e-9)
    factors = leading_triplets(matrix.t(), len(spectrum), 1e-7)
    np.testing.assert_allclose(factors.left @ factors.right, (u @ vh).T, atol=1e-8)
    np.testing.assert_allclose(factors.values, s, rtol=1e-9)


def test_more_accurate_than_float32():
    exact = with_spectrum(np.arange(1.0, 61) ** -0.7, 90, 60)
    single = exact.float()
    reference = leading_triplets(single.double(), 8).product()
    found = leading_triplets(single, 8).product()
    u, s, vh = torch.linalg.svd(single, full_matrices=False)
    plain = (u[:, :8] * s[:8]) @ vh[:8]
    assert (found - reference).norm() < 1e-12
    assert (plain - reference).norm() > 1e-8


@given(m=st.integers(3, 9), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_inverse_root_gives_the_polar_factor(m, k, seed):
    matrix = torch.tensor(np.random.default_rng(seed).normal(size=(m, k)))
    u, _, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    found = matrix @ inverse_root(matrix.T @ matrix)
    np.testing.assert_allclose(found, u @ vh, atol=1e-6)


def test_inverse_root_of_duplicates_stays_on_the_range():
    one = torch.linalg.qr(torch.randn(9, 3, dtype=torch.float64))[0]
    matrix = torch.cat([one, one], dim=1)
    whitened = matrix @ inverse_root(matrix.T @ matrix)
    np.testing.assert_allclose(whitened @ whitened.T, one @ one.T, atol=1e-9)
    softened = matrix @ inverse_root(matrix.T @ matrix, shrinkage=1.0)
    assert softened.norm() < whitened.norm()


def test_polar_factor():
    matrix = with_spectrum([4.0, 2.0, 1e-9], 8, 6)
    polar, values = polar_and_values(matrix)
    np.testing.assert_allclose(values, [4.0, 2.0])
    np.testing.assert_allclose(np.linalg.svd(polar.numpy())[1], [1, 1, 0, 0, 0, 0], atol=1e-9)


def test_map_on_cores_keeps_order_threads_and_errors():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert map_on_cores(lambda x: x * x, range(20), size=1 << 20) == [x * x for x in range(20)]
        with pytest.raises(ZeroDivisionError):
            map_on_cores(lambda x: 1 // x, [1, 0], size=1 << 20)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
