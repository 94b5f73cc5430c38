import pytest
import torch

from lightning_merge.functional.chebyshev import chebyshev_weights


def quadratic_tasks(T: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(T, size, size, generator=generator, dtype=torch.float64)
    points = torch.randn(T, size, generator=generator, dtype=torch.float64)
    return root @ root.mT + 0.1 * torch.eye(size, dtype=torch.float64), points


@pytest.mark.parametrize("T", [1, 2, 5])
def test_reaches_the_minimax(T: int) -> None:
    C, points = quadratic_tasks(T, 4)
    p = torch.arange(1, T + 1, dtype=torch.float64)
    p = p / p.sum()
    gaps = torch.linspace(1, 3, T, dtype=torch.float64)
    solved: list[torch.Tensor] = []

    def excess(w: torch.Tensor) -> torch.Tensor:
        x = torch.linalg.solve(
            (w[:, None, None] * C).sum(0), (w[:, None] * (C @ points[..., None])[..., 0]).sum(0)
        )
        solved.append(x)
        difference = x - points
        return torch.einsum("ti,tij,tj->t", difference, C, difference)

    weights, gap = chebyshev_weights(p, gaps, excess)
    assert gap <= 1e-6
    assert len(solved) < 1000
    v = p * excess(weights) / gaps
    if T > 1:
        active = weights * gaps / p > 1e-3
        assert float((v[active].max() - v[active].min()) / v.max()) < 1e-3
        assert bool((v <= v.max() * (1 + 1e-9)).all())
        best = solved[-1]
        for seed in range(200):
            step = torch.randn(4, generator=torch.Generator().manual_seed(seed)).double()
            moved = best + 0.05 * step - points
            worst = (p * torch.einsum("ti,tij,tj->t", moved, C, moved) / gaps).max()
            assert float(worst) >= float(v.max()) * (1 - 1e-5)


def test_unreached_gap_is_an_error() -> None:
    with pytest.raises(ValueError, match="relative gap"):
        chebyshev_weights(
            torch.full((2,), 0.5).double(),
            torch.ones(2).double(),
            lambda _: torch.tensor([1.0, 0.1], dtype=torch.float64),
            max_steps=3,
            tolerance=1e-9,
        )
