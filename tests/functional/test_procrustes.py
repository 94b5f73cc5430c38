import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_merge.functional.procrustes import (
    numerical_rank,
    orthogonal_factor,
    procrustes,
    refined_procrustes,
    similarity_scale,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _reference_polar(A: np.ndarray) -> np.ndarray:
    """Limit of A (A'A)^(-1/2), through an eigendecomposition."""
    values, Q = np.linalg.eigh(A.T @ A)
    return A @ (Q / np.sqrt(values)) @ Q.T


def objective(W: torch.Tensor, A: torch.Tensor, G: torch.Tensor) -> float:
    return float(((W @ G) * W).sum() - 2 * (W * A).sum())


@settings(deadline=None, max_examples=20)
@given(k=st.integers(1, 7), extra=st.integers(0, 4), seed=st.integers(0, 99))
def test_matches_inverse_square_root(k: int, extra: int, seed: int) -> None:
    A = normal(k + extra, k, seed=seed)
    W = orthogonal_factor(A)
    assert torch.allclose(W, torch.from_numpy(_reference_polar(A.numpy())), atol=1e-7)
    assert torch.allclose(W.T @ W, torch.eye(k, dtype=torch.float64), atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(d=st.integers(2, 7), rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_completion_is_the_limit_of_a_vanishing_anchor(d: int, rank: int, seed: int) -> None:
    rank = min(rank, d - 1)
    A = normal(d, rank, seed=seed) @ normal(rank, d, seed=seed + 1)
    W = orthogonal_factor(A)
    tau = 1e-7
    limit = orthogonal_factor(A + tau * torch.eye(d, dtype=torch.float64))
    assert torch.allclose(W, limit, atol=1e-3)
    # It stays a minimiser, and is the nearest one to the identity.
    assert torch.allclose(W @ W.T, torch.eye(d, dtype=torch.float64), atol=1e-10)
    assert float((W * A).sum()) == pytest.approx(float(torch.linalg.svdvals(A).sum()))
    plain = orthogonal_factor(A, completion="svd")
    eye = torch.eye(d, dtype=torch.float64)
    assert float((W - eye).norm()) <= float((plain - eye).norm()) + 1e-9


def test_equal_features_with_few_samples_give_the_identity() -> None:
    Z = normal(9, 4)
    assert torch.allclose(orthogonal_factor(Z @ Z.T), torch.eye(9, dtype=torch.float64), atol=1e-10)
    plain = orthogonal_factor(Z @ Z.T, completion="svd")
    assert not torch.allclose(plain, torch.eye(9, dtype=torch.float64), atol=1e-2)


def test_anchor_tends_to_the_identity() -> None:
    A, G = normal(5, 5), torch.eye(5, dtype=torch.float64)
    assert torch.allclose(procrustes(A, G, anchor=1e9), G, atol=1e-7)
    with pytest.raises(ValueError, match="k = d"):
        procrustes(normal(4, 5), G, anchor=1.0)


@pytest.mark.parametrize("rank", [3, 5])
def test_proper_has_determinant_one(rank: int) -> None:
    for seed in range(6):
        A = normal(5, rank, seed=seed) @ normal(rank, 5, seed=seed + 50)
        W = orthogonal_factor(A, proper=True)
        assert float(torch.linalg.det(W)) == pytest.approx(1.0)
        if rank == 5 and float(torch.linalg.det(A)) > 0:
            assert torch.allclose(W, orthogonal_factor(A))


def test_undetermined_completion_warns() -> None:
    # The seen direction maps e0 to e1; the unseen complements share only part of the identity.
    A = torch.zeros(2, 2, dtype=torch.float64)
    A[1, 0] = 1.0
    with pytest.warns(UserWarning, match="1 unseen directions"):
        W = orthogonal_factor(A)
    assert torch.allclose(W @ W.T, torch.eye(2, dtype=torch.float64))


def test_zero_matrix_has_nothing_to_align() -> None:
    with pytest.raises(ValueError, match="nothing to align"):
        orthogonal_factor(torch.zeros(3, 3, dtype=torch.float64))


def test_wide_refinement_descends_and_beats_random_maps() -> None:
    Z = normal(7, 40) * torch.arange(1, 8, dtype=torch.float64)[:, None]
    Y = normal(3, 7, seed=1) @ Z + normal(3, 40, seed=2)
    A, G = Y @ Z.T, Z @ Z.T
    start = orthogonal_factor(A)
    W = refined_procrustes(start, A, G)
    assert objective(W, A, G) < objective(start, A, G) - 1.0
    assert torch.allclose(W @ W.T, torch.eye(3, dtype=torch.float64), atol=1e-10)
    assert torch.equal(W, procrustes(A, G))
    for seed in range(50):
        other = orthogonal_factor(W + 0.05 * normal(3, 7, seed=seed))
        assert objective(other, A, G) >= objective(W, A, G) - 1e-6 * abs(objective(W, A, G))


def test_tall_polar_beats_random_maps() -> None:
    Z, Y = normal(3, 30), normal(6, 30, seed=1)
    A, G = Y @ Z.T, Z @ Z.T
    W = procrustes(A, G)
    for seed in range(50):
        assert objective(orthogonal_factor(normal(6, 3, seed=seed)), A, G) >= objective(W, A, G)


def test_unequal_widths_map_unseen_directions_to_zero() -> None:
    Z, Y = normal(6, 2), normal(4, 2, seed=1)
    W = procrustes(Y @ Z.T, Z @ Z.T)
    unseen = torch.linalg.svd(Z)[0][:, 2:]
    assert float((W @ unseen).abs().max()) < 1e-10


def test_scale_is_the_best_factor() -> None:
    Z, Y = normal(4, 20), normal(4, 20, seed=1)
    A, G = Y @ Z.T, Z @ Z.T
    W = procrustes(A, G)
    c = similarity_scale(W, A, G)
    best = objective(c * W, A, G)
    assert c == pytest.approx(float(torch.linalg.svdvals(A).sum() / G.trace()))
    assert all(objective((c + step) * W, A, G) > best for step in (-1e-3, 1e-3))


def test_numerical_rank() -> None:
    assert numerical_rank(torch.tensor([1.0, 1e-3, 1e-18], dtype=torch.float64), 3) == 2
