import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_merge.methods import Average, TaskArithmetic
from tests.methods.models import flat, model_sets


@given(data=model_sets(), scale=st.floats(-2, 2))
def test_equation(data, scale):
    base, experts = data
    merged = flat(TaskArithmetic(scale=scale).merge(base, experts))
    origin = flat(base)
    expected = origin + scale * sum(flat(e) - origin for e in experts.values())
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=2e-6)


@given(data=model_sets())
def test_zero_scale_is_the_base_bitwise(data):
    base, experts = data
    merged = TaskArithmetic(scale=0.0).merge(base, experts)
    assert all(torch.equal(merged[n], base[n]) for n in base)


@given(data=model_sets(max_experts=1))
def test_one_expert_at_scale_one_is_returned(data):
    base, experts = data
    merged = TaskArithmetic(scale=1.0).merge(base, experts)
    for name in base:
        torch.testing.assert_close(merged[name], experts["task0"][name], rtol=1e-6, atol=1e-6)


@given(data=model_sets())
def test_scale_of_one_over_t_is_the_average(data):
    base, experts = data
    merged = TaskArithmetic(scale=1 / len(experts)).merge(base, experts)
    mean = Average().merge(base, experts)
    for name in base:
        torch.testing.assert_close(merged[name], mean[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_must_be_finite(scale):
    with pytest.raises(ValueError, match="scale must be a finite number"):
        TaskArithmetic(scale=scale)
