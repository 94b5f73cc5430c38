import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_merge.functional.average import average
from lightning_merge.methods import Average
from tests.methods.models import flat, model_sets, models


@given(data=model_sets(), raw=st.lists(st.floats(0.1, 5), min_size=4, max_size=4))
def test_weighted_mean_of_the_experts(data, raw):
    base, experts = data
    weights = dict(zip(experts, raw, strict=False))
    merged = flat(Average(weights=weights).merge(base, experts))
    rows = np.stack([flat(e) for e in experts.values()])
    expected = np.average(rows, axis=0, weights=list(weights.values()))
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)
    slack = 1e-6 * (1 + np.abs(rows).max(axis=0))
    assert (merged <= rows.max(axis=0) + slack).all()  # in the convex hull
    assert (merged >= rows.min(axis=0) - slack).all()


@given(data=model_sets(max_experts=1))
def test_one_expert_is_returned_bitwise(data):
    base, experts = data
    merged = Average().merge(base, experts)
    assert all(torch.equal(merged[n], experts["task0"][n]) for n in base)


@given(
    data=model_sets(max_experts=1),
    raw=st.lists(st.floats(-1, 5).filter(bool), min_size=2, max_size=6),
)
def test_identical_experts_are_returned_bitwise(data, raw):
    assume(abs(sum(raw)) > 1e-3)
    base, experts = data
    weights = {f"copy{i}": weight for i, weight in enumerate(raw)}
    merged = Average(weights=weights).merge(base, dict.fromkeys(weights, experts["task0"]))
    assert all(torch.equal(merged[name], experts["task0"][name]) for name in base)


@given(raw=st.lists(st.floats(-2, 2), min_size=2, max_size=5))
def test_weights_of_any_sign(raw):
    total = sum(raw)
    assume(abs(total) > 0.05)
    rows = torch.randn(len(raw), 7, generator=torch.Generator().manual_seed(0))
    expected = np.average(rows.double().numpy(), axis=0, weights=raw)
    slack = 1e-6 * sum(map(abs, raw)) / abs(total)
    found = average(rows, torch.tensor(raw, dtype=torch.float64))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=5 * slack)


def test_weights_follow_names_not_order():
    base, experts = models(2)
    merged = Average(weights={"task1": 1.0, "task0": 3.0}).merge(base, experts)
    expected = 0.75 * experts["task0"]["fc.bias"] + 0.25 * experts["task1"]["fc.bias"]
    torch.testing.assert_close(merged["fc.bias"], expected)


def test_statistics_get_the_same_weights():
    base = {"bn.running_var": torch.ones(1)}
    experts = {"a": {"bn.running_var": torch.zeros(1)}, "b": {"bn.running_var": torch.ones(1)}}
    merged = Average(weights={"a": 1.0, "b": 3.0}).merge(base, experts)
    assert merged["bn.running_var"].item() == 0.75


def test_weight_errors():
    base, experts = models(2)
    with pytest.raises(ValueError, match="missing: task1; unknown: nope"):
        Average(weights={"task0": 1.0, "nope": 1.0}).merge(base, experts)
    with pytest.raises(ValueError, match="sum that is not zero"):
        Average(weights={"a": 1.0, "b": -1.0})
    with pytest.raises(ValueError, match="finite"):
        Average(weights={"a": float("inf")})
