"""Scores of a ridge against brute force over the features."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_merge.functional.gcv import press, ridge_spectrum


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def ridge(Z: torch.Tensor, Y: torch.Tensor, W0: torch.Tensor, beta: float) -> torch.Tensor:
    eye = torch.eye(len(Z), dtype=torch.float64)
    return (Y @ Z.T + beta * W0) @ torch.linalg.inv(Z @ Z.T + beta * eye)


@settings(deadline=None, max_examples=20)
@given(
    n=st.integers(1, 12), d=st.integers(1, 6), k=st.integers(1, 4),
    beta=st.sampled_from([1e-4, 1e-2, 1.0, 1e3]),
)  # fmt: skip
def test_rss_df_gcv_and_evidence(n: int, d: int, k: int, beta: float) -> None:
    Z, Y, W0 = normal(d, n), normal(k, n, seed=1), normal(k, d, seed=2)
    spectrum = ridge_spectrum(Y @ Z.T, Z @ Z.T, float(Y.square().sum()), W0, float(n))
    betas = torch.tensor([beta], dtype=torch.float64)
    W = ridge(Z, Y, W0, beta)
    rss = float((W @ Z - Y).square().sum())
    hat = Z.T @ torch.linalg.inv(Z @ Z.T + beta * torch.eye(d, dtype=torch.float64)) @ Z
    df = float(hat.trace())
    energy = float((Y - W0 @ Z).square().sum())
    assert float(spectrum.rss(betas)) == pytest.approx(rss, rel=1e-7, abs=1e-9 * energy)
    assert float(spectrum.df(betas)) == pytest.approx(df, rel=1e-9)
    gcv = n * rss / (n - 1.4 * df) ** 2 if n > 1.4 * df else math.inf
    if math.isinf(gcv) or rss > 1e-6 * energy:
        assert float(spectrum.gcv(betas)) == pytest.approx(gcv, rel=1e-6)
    # The residual is Gaussian with covariance s (I + Z'Z / beta), its scale s profiled out.
    K = torch.eye(n, dtype=torch.float64) + Z.T @ Z / beta
    R = Y - W0 @ Z
    quadratic = float((R @ torch.linalg.inv(K) * R).sum())
    evidence = k * n * math.log(quadratic) + k * float(torch.logdet(K))
    assert float(spectrum.negative_log_evidence(betas)) == pytest.approx(
        evidence, rel=1e-6, abs=1e-6
    )


def test_problems_side_by_side_are_one_spectrum() -> None:
    grams, crosses, priors, parts = [], [], [], []
    for seed in range(3):
        Z, Y, W0 = normal(4, 7, seed=seed), normal(2, 7, seed=10 + seed), normal(2, 4, seed=20)
        energy = float(Y.square().sum())
        parts.append((ridge_spectrum(Y @ Z.T, Z @ Z.T, energy, W0, 7.0), energy))
        grams, crosses, priors = [*grams, Z @ Z.T], [*crosses, Y @ Z.T], [*priors, W0]
    stacked = [torch.stack(values) for values in (crosses, grams, priors)]
    joined = ridge_spectrum(*stacked[:2], sum(e for _, e in parts), stacked[2], 21.0)
    betas = torch.tensor([1e-3, 0.5, 20.0], dtype=torch.float64)
    for score in ("rss", "df"):
        expected = sum(getattr(part, score)(betas) for part, _ in parts)
        torch.testing.assert_close(getattr(joined, score)(betas), expected)


def test_infinite_ridge_leaves_the_prior() -> None:
    Z, Y, W0 = normal(3, 9), normal(2, 9, seed=1), normal(2, 3, seed=2)
    spectrum = ridge_spectrum(Y @ Z.T, Z @ Z.T, float(Y.square().sum()), W0, 9.0, centred=True)
    infinite = torch.tensor([math.inf], dtype=torch.float64)
    assert float(spectrum.rss(infinite)) == pytest.approx(float((Y - W0 @ Z).square().sum()))
    assert float(spectrum.df(infinite)) == 1.0


@pytest.mark.parametrize("n", [3, 9])
def test_press_is_leave_one_out(n: int) -> None:
    Z, Y, W0 = normal(5, n), normal(4, n, seed=1), normal(4, 5, seed=2)
    total = 0.0
    for j in range(n):
        keep = [i for i in range(n) if i != j]
        W = ridge(Z[:, keep], Y[:, keep], W0, 0.3)
        total += float((W @ Z[:, j] - Y[:, j]).square().sum())
    assert press(Z, Y, W0, 0.3) == pytest.approx(total)
