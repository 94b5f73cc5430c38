"""The head metric against a dense Kronecker solve."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_merge.functional.head_metric import (
    Decoupling,
    HeadSystem,
    conjugate_gradients,
    independent,
    readout,
    row_space,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def system(T: int, r: int, k: int, d: int, floor: float, seed: int = 0) -> HeadSystem:
    rows = [readout(normal(r, k, seed=seed + t)) for t in range(T)]
    Z = (
        normal(T, d, 2 * d, seed=seed + 100)
        * torch.logspace(0, -1, d, dtype=torch.float64)[:, None]
    )
    C = Z @ Z.mT + 0.01 * torch.eye(d, dtype=torch.float64)
    return HeadSystem(rows, C, normal(T, k, d, seed=seed + 200), floor)


def dense(problem: HeadSystem, w: torch.Tensor) -> torch.Tensor:
    """Solve with vec(S W C) = (S kron C) vec(W), rows first."""
    k, d = problem.targets.shape[1:]
    big = torch.zeros(k * d, k * d, dtype=torch.float64)
    right = torch.zeros(k, d, dtype=torch.float64)
    for x, H, C, N in zip(w, problem.rows, problem.curvatures, problem.targets, strict=True):
        S = H.T @ H + problem.floor * torch.eye(k, dtype=torch.float64)
        big += x * torch.kron(S, C)
        right += x * S @ N
    return torch.linalg.solve(big, right.flatten()).view(k, d)


@settings(deadline=None, max_examples=15)
@given(
    T=st.integers(1, 4), r=st.integers(2, 7), k=st.integers(1, 6), d=st.integers(1, 6),
    floor=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_conjugate_gradients_equal_a_dense_solve(
    T: int, r: int, k: int, d: int, floor: float, seed: int
) -> None:
    problem = system(T, r, k, d, floor, seed)
    w = torch.rand(3, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05
    start = torch.zeros(3, k, d, dtype=torch.float64)
    W, residual = conjugate_gradients(problem, w, start, tolerance=1e-11)
    assert residual <= 1e-11
    for row, found in zip(w, W, strict=True):
        assert torch.allclose(found, dense(problem, row), rtol=1e-6, atol=1e-7)
    again, _ = conjugate_gradients(problem, w[1:2], start[:1], tolerance=1e-11)
    assert torch.allclose(again[0], W[1], rtol=1e-6, atol=1e-8)


def test_one_task_needs_one_step() -> None:
    problem = system(1, 4, 5, 6, 1e-3)
    start = torch.zeros(1, 5, 6, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    W, _ = conjugate_gradients(problem, one, start, tolerance=1e-8, max_steps=2)
    own = problem.targets[0] @ torch.linalg.inv(problem.curvatures[0])
    assert torch.allclose(W[0], own, atol=1e-6)


def test_a_solution_out_of_reach_is_an_error() -> None:
    problem = system(3, 4, 5, 6, 1e-3)
    start = torch.zeros(1, 5, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="relative residual"):
        conjugate_gradients(problem, torch.ones(1, 3).double(), start, tolerance=1e-14, max_steps=1)


@settings(deadline=None, max_examples=20)
@given(c=st.integers(2, 9), k=st.integers(2, 6), seed=st.integers(0, 99))
def test_readout_keeps_what_changes_probabilities(c: int, k: int, seed: int) -> None:
    H = normal(c, k, seed=seed)
    rows = readout(H)
    centred = H - H.mean(0)
    gram = centred.T @ centred
    assert torch.allclose(rows.T @ rows, gram * k / gram.trace(), atol=1e-10)
    assert len(rows) <= max(k, c if c <= k else k)
    shifted = readout(H + normal(k, seed=seed + 1))
    assert torch.allclose(shifted.T @ shifted, rows.T @ rows, atol=1e-10)


def test_readout_of_one_row_and_of_nothing() -> None:
    H = normal(1, 4)
    assert torch.allclose(readout(H), H * 2 / H.norm())
    uncentred = readout(normal(3, 4), centre=False)
    assert torch.linalg.matrix_rank(uncentred) == 3
    with pytest.raises(ValueError, match="reads nothing"):
        readout(torch.ones(3, 4, dtype=torch.float64))


def test_independent_heads_get_their_own_map_and_the_limit_agrees() -> None:
    k, d = 9, 5
    rows = [readout(normal(3, k, seed=t)) for t in range(3)]
    bases = [row_space(H)[0] for H in rows]
    assert [len(b) for b in bases] == [2, 2, 2]
    assert independent(bases)
    assert not independent([*bases, bases[0]])
    assert not independent([torch.eye(9, dtype=torch.float64), bases[0]])
    Z = normal(3, d, 3 * d, seed=7)
    C = Z @ Z.mT
    own = normal(3, k, d, seed=8)
    w = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    mixed = (w[:, None, None] * C).sum(0)
    shared = torch.linalg.solve(mixed, (w[:, None, None] * (own @ C)).sum(0), left=False)
    decoupled = Decoupling.of(bases, list(own))
    W = decoupled.maps(shared)
    H = normal(4, k, seed=9)
    left, constant = decoupled.split(H)
    assert torch.allclose(left @ shared + constant, H @ W, atol=1e-10)
    for H, W_t in zip(rows, own, strict=True):
        assert torch.allclose(H @ W, H @ W_t, atol=1e-10)
    complement = torch.linalg.svd(torch.cat(bases))[2][6:]
    assert torch.allclose(complement @ W, complement @ shared, atol=1e-10)
    limit = dense(HeadSystem(rows, C, own @ C, 1e-7), w)
    assert torch.allclose(W, limit, atol=1e-4)
    plain = dense(HeadSystem(rows, C, own @ C, 1e7), w)
    assert torch.allclose(shared, plain, atol=1e-4)
