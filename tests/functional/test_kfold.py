"""Held-out curves against refitting on features."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_merge.functional.kfold import rotated_fold


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 9), m=st.integers(1, 5), d=st.integers(1, 6), k=st.integers(1, 4),
    beta=st.sampled_from([1e-3, 1.0, 1e3, math.inf]), seed=st.integers(0, 9),
)  # fmt: skip
def test_equals_refitting(n: int, m: int, d: int, k: int, beta: float, seed: int) -> None:
    Z, Y, W0 = normal(d, n, seed=seed), normal(k, n, seed=1), normal(k, d, seed=2)
    Zf, Yf = normal(d, m, seed=3), normal(k, m, seed=4)
    G = Z @ Z.T
    rotated = rotated_fold(Y @ Z.T, G, Yf @ Zf.T, Zf @ Zf.T, float(Yf.square().sum()))
    curve = rotated.curve(W0 @ rotated.basis)
    eye = torch.eye(d, dtype=torch.float64)
    W = W0 if math.isinf(beta) else (Y @ Z.T + beta * W0) @ torch.linalg.inv(G + beta * eye)
    brute = float((W @ Zf - Yf).square().sum())
    found = curve(torch.tensor([1.0, beta], dtype=torch.float64))
    assert float(found[1]) == pytest.approx(brute, rel=1e-8, abs=1e-8)
