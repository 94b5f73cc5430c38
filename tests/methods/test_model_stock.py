from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_merge.functional.model_stock import interpolation_ratio
from lightning_merge.methods import Average, ModelStock
from tests.methods.models import model_sets, models


def reference(base, experts, pair_mean):
    vectors = [e - base for e in experts]
    cosines = []
    for a, b in combinations(vectors, 2):
        norm = np.linalg.norm(a) * np.linalg.norm(b)
        cosines.append(np.clip((a * b).sum() / norm, -1, 1) if norm > 0 else 0.0)
    c = np.mean(cosines) if pair_mean == "cos" else np.cos(np.mean(np.arccos(cosines)))
    c = np.clip(c, 0, 1)
    r = len(experts) * c / (1 + (len(experts) - 1) * c)
    return r * np.mean(experts, axis=0) + (1 - r) * base


@given(data=model_sets(min_experts=2), pair_mean=st.sampled_from(["cos", "angle"]))
def test_equation_by_tensor_and_by_row(data, pair_mean):
    base, experts = data
    whole = ModelStock(pair_mean=pair_mean).merge(base, experts)
    rows = ModelStock(pair_mean=pair_mean, unit="row").merge(base, experts)
    for name, value in base.items():
        origin = np.asarray(value, np.float64)
        tuned = [np.asarray(e[name], np.float64) for e in experts.values()]
        expected = reference(origin, tuned, pair_mean)
        np.testing.assert_allclose(whole[name], expected, rtol=1e-5, atol=1e-5)
        if origin.ndim < 2:
            assert torch.equal(rows[name], whole[name])
            continue
        for i in range(len(origin)):
            by_row = reference(origin[i], [e[i] for e in tuned], pair_mean)
            np.testing.assert_allclose(rows[name][i], by_row, rtol=1e-5, atol=1e-5)


def test_orthogonal_stays_and_parallel_is_the_average():
    base = {"w": torch.ones(2, 3)}
    orthogonal = {t: {"w": base["w"] + torch.eye(3)[i]} for i, t in enumerate("abc")}
    assert torch.equal(ModelStock().merge(base, orthogonal)["w"], base["w"])
    parallel = {t: {"w": base["w"] + i * torch.eye(3)[0]} for i, t in enumerate("abc", start=1)}
    mean = Average().merge(base, parallel)["w"]
    torch.testing.assert_close(ModelStock().merge(base, parallel)["w"], mean)


@given(seed=st.integers(0, 99), num_experts=st.integers(2, 6))
def test_ratio_lies_in_the_unit_interval_even_for_opposed_experts(seed, num_experts):
    vectors = torch.randn(num_experts, 4, 3, generator=torch.Generator().manual_seed(seed))
    vectors -= vectors.mean(dim=0)  # mean cosine near -1 / (T - 1), where r has its pole
    ratios = interpolation_ratio(vectors)
    assert ((ratios >= 0) & (ratios <= 1)).all()


def test_a_zero_task_vector_counts_as_orthogonal():
    base = {"w": torch.zeros(3)}
    experts = {"a": {"w": torch.ones(3)}, "b": {"w": torch.ones(3)}, "c": base}
    c = 1 / 3
    r = 3 * c / (1 + 2 * c)
    torch.testing.assert_close(ModelStock().merge(base, experts)["w"], torch.full((3,), r * 2 / 3))


def test_one_expert_is_an_error():
    base, experts = models(1)
    with pytest.raises(ValueError, match=r"needs two experts or more.*task0 alone"):
        ModelStock().merge(base, experts)
