import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_merge.methods import Average, TaskArithmetic
from tests.methods.models import flat, model_sets, models


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
    assert all(torch.equal(merged[name], experts["task0"][name]) for name in base)


@given(data=model_sets(), scale=st.floats(-2, 2))
def test_entries_that_no_expert_changed_are_the_bases_bitwise(data, scale):
    base, experts = data
    for expert in experts.values():
        for name, value in expert.items():
            value.view(-1)[::3] = base[name].view(-1)[::3]
    merged = TaskArithmetic(scale=scale).merge(base, experts)
    for name, value in base.items():
        assert torch.equal(merged[name].view(-1)[::3], value.view(-1)[::3])


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


@given(
    data=model_sets(min_experts=2, max_experts=2),
    weights=st.tuples(st.floats(0.1, 2), st.floats(-3, -2.5)),
    normalize=st.booleans(),
)
def test_weights_and_their_sum(data, weights, normalize):
    base, experts = data
    origin = flat(base)
    update = sum(w * (flat(e) - origin) for w, e in zip(weights, experts.values(), strict=True))
    expected = origin + 0.7 * update / (sum(weights) if normalize else 1)
    by_task = dict(reversed(list(zip(experts, weights, strict=True))))
    method = TaskArithmetic(scale=0.7, weights=by_task, normalize=normalize)
    np.testing.assert_allclose(flat(method.merge(base, experts)), expected, rtol=1e-4, atol=1e-4)


@given(data=model_sets())
def test_normalized_at_scale_one_is_the_average(data):
    base, experts = data
    merged = TaskArithmetic(scale=1.0, normalize=True).merge(base, experts)
    mean = Average().merge(base, experts)
    for name in base:
        torch.testing.assert_close(merged[name], mean[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"a": 1.0, "b": -1.0}, "normalize": True}, "which is zero.*leave normalize"),
        ({"weights": {"a": float("nan")}}, "weights must be finite"),
    ],
)
def test_weights_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        TaskArithmetic(**options)


def test_weights_must_name_the_experts():
    base, experts = models(2)
    with pytest.raises(ValueError, match="missing: task1; unknown: none"):
        TaskArithmetic(weights={"task0": 1.0}).merge(base, experts)
