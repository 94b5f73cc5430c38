import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_merge.functional.breadcrumbs import breadcrumbs
from lightning_merge.methods import TIES, Breadcrumbs, TaskArithmetic
from tests.methods.models import model_sets


@pytest.mark.parametrize("size", range(1, 51))
def test_kept_count_is_exact_for_small_tensors(size):
    values = torch.arange(1.0, size + 1)[torch.randperm(size, generator=torch.Generator())]
    for density, drop_top in [(0.15, 0.01), (0.5, 0.1), (0.9, 0.3), (1.0, 0.5)]:
        kept = breadcrumbs(values, density, drop_top)
        expected = max(1, round(density * size))
        top = min(round(drop_top * size), size - expected)
        # values are their own ranks, from one
        assert sorted(kept[kept != 0].tolist()) == list(
            np.arange(size - top - expected + 1.0, size - top + 1)
        )


@given(data=model_sets())
def test_all_kept_is_task_arithmetic(data):
    base, experts = data
    merged = Breadcrumbs(density=1.0, drop_top=0.0).merge(base, experts)
    plain = TaskArithmetic(scale=0.3).merge(base, experts)
    for name in base:
        torch.testing.assert_close(merged[name], plain[name], rtol=1e-6, atol=1e-6)


@given(data=model_sets(integers=True), density=st.sampled_from([0.2, 0.6]))
def test_equation(data, density):
    base, experts = data
    merged = Breadcrumbs(density=density, drop_top=0.2, scale=0.5).merge(base, experts)
    for name, value in base.items():
        total = np.zeros(value.numel())
        for expert in experts.values():
            row = np.asarray(expert[name] - value, np.float64).ravel()
            kept = min(len(row), max(1, round(density * len(row))))
            top = min(round(0.2 * len(row)), len(row) - kept)
            order = sorted(range(len(row)), key=lambda j: (abs(row[j]), -j))
            chosen = order[len(row) - top - kept : len(row) - top]
            total[chosen] += row[chosen]
        expected = np.asarray(value, np.float64) + 0.5 * total.reshape(value.shape)
        np.testing.assert_allclose(merged[name], expected, atol=1e-6)


@given(data=model_sets(min_experts=2))
def test_ties_of_everything(data):
    base, experts = data
    method = Breadcrumbs(density=1.0, drop_top=0.0, combine="ties", scale=1.0)
    merged, plain = (
        method.merge(base, experts),
        TIES(density=1.0, scope="tensor").merge(base, experts),
    )
    assert all(torch.equal(merged[name], plain[name]) for name in base)


@pytest.mark.parametrize("drop_top", [-0.1, 1.0, float("nan")])
def test_drop_top_errors(drop_top):
    with pytest.raises(ValueError, match=r"drop_top must lie in \[0, 1\)"):
        Breadcrumbs(drop_top=drop_top)
