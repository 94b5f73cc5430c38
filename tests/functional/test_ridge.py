import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_merge.functional.ridge import dual_ridge, ridgeless, solve_right


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 12), d=st.integers(1, 8), k=st.integers(1, 5),
    beta=st.sampled_from([1e-6, 1e-2, 1.0, 1e3]),
)  # fmt: skip
def test_dual_equals_primal(n: int, d: int, k: int, beta: float) -> None:
    Z, Y, W0 = normal(d, n), normal(k, n, seed=1), normal(k, d, seed=2)
    ridge = beta * torch.eye(d, dtype=torch.float64)
    primal = solve_right(Y @ Z.T + beta * W0, Z @ Z.T + ridge)
    tolerance = 1e-9 * max(1.0, float(primal.norm())) * max(1.0, 1e-4 / beta)
    assert float((dual_ridge(Z, Y, W0, beta) - primal).norm()) <= tolerance
    # Both equal least squares on the stacked system.
    stacked = torch.cat([Z, beta**0.5 * torch.eye(d, dtype=torch.float64)], 1)
    wanted = torch.cat([Y, beta**0.5 * W0], 1)
    reference = torch.linalg.lstsq(stacked.T, wanted.T).solution.T
    assert float((reference - primal).norm()) <= tolerance


@pytest.mark.parametrize("n", [3, 20])
def test_ridgeless_is_the_limit(n: int) -> None:
    Z, Y, W0 = normal(6, n), normal(4, n, seed=1), normal(4, 6, seed=2)
    W = ridgeless(Y @ Z.T, Z @ Z.T, W0)
    assert torch.allclose(W, dual_ridge(Z, Y, W0, 1e-7), atol=1e-5)
    reference = W0 + (Y - W0 @ Z) @ torch.linalg.pinv(Z)
    assert torch.allclose(W, reference, atol=1e-9)


def test_ridgeless_without_energy_is_the_prior() -> None:
    W0 = normal(2, 3)
    zero = torch.zeros(3, 3, dtype=torch.float64)
    assert torch.equal(ridgeless(zero[:2], zero, W0), W0)


def test_damaged_moments_raise() -> None:
    good = torch.eye(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="not positive definite"):
        solve_right(good, -good)
    with pytest.raises(ValueError, match=r"not positive definite|accurately"):
        solve_right(good, good * torch.nan)


def test_batched_solve() -> None:
    M = torch.stack([normal(5, 9, seed=s) for s in range(3)])
    M = M @ M.mT
    N = normal(3, 2, 5, seed=9)
    assert torch.allclose(solve_right(N, M), N @ torch.linalg.inv(M), atol=1e-9)


@pytest.mark.parametrize("d", [255, 256, 300, 512])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_solves_of_every_size(d: int, batch: tuple[int, ...]) -> None:
    """Sizes of the cache's period are factorised in blocks."""
    generator = torch.Generator().manual_seed(d)
    Z = torch.randn(*batch, d, 2 * d, generator=generator, dtype=torch.float64)
    M = Z @ Z.mT / d + 1e-3 * torch.eye(d, dtype=torch.float64)
    X = torch.randn(*batch, 7, d, generator=generator, dtype=torch.float64)
    assert torch.allclose(solve_right(X @ M, M), X, rtol=1e-9, atol=1e-9)
    M[..., -1, -1] = -1.0
    with pytest.raises(ValueError, match="not positive definite"):
        solve_right(X, M)
    M[..., 0, 0] = -1.0
    with pytest.raises(ValueError, match="not positive definite"):
        solve_right(X, M)
