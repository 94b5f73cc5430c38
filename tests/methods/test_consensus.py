from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_merge.functional.tall import pack_mask, tall_masks, unpack_mask
from lightning_merge.methods import TIES, Coefficient, Consensus, TaskArithmetic
from tests.methods.models import flat, flat_task_vectors, model_sets, models


@given(
    data=model_sets(integers=True),
    kappa=st.sampled_from([0.0, 0.25, 0.5, 2.0]),
    k=st.integers(0, 5),
)
def test_equation(data, kappa, k):
    base, experts = data
    merged = flat(Consensus(threshold=kappa, min_active=k, scale=0.5).merge(base, experts))
    rows = flat_task_vectors(base, experts)
    total = rows.sum(axis=0)
    active = (np.abs(rows) > kappa * np.abs(total - rows)).sum(axis=0)
    np.testing.assert_allclose(merged, flat(base) + 0.5 * total * (active >= k), atol=1e-6)


@given(data=model_sets(integers=True), k=st.integers(0, 3))
def test_the_vector_of_ties(data, k):
    base, experts = data
    method = Consensus(vector="ties", density=0.4, threshold=0.3, min_active=k, scale=0.5)
    merged = flat(method.merge(base, experts))
    rows = flat_task_vectors(base, experts)
    vector = flat(TIES(density=0.4).merge(base, experts)) - flat(base)  # base: zeros
    active = (np.abs(rows) > 0.3 * np.abs(vector - rows)).sum(axis=0)
    np.testing.assert_allclose(merged, flat(base) + 0.5 * vector * (active >= k), atol=1e-6)


def test_the_vector_of_ties_knows_coefficients_and_what_is_left_out():
    base, experts = models(3)
    options = {
        "coefficients": (Coefficient(pattern="fc.*", value=3.0),),
        "exclude": ("conv.*",),
        "otherwise": "base",
    }
    method = Consensus(vector="ties", min_active=0, scale=1.0, **options)
    merged, ties = method.merge(base, experts), TIES(**options).merge(base, experts)
    for name, value in ties.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)
    stacked = torch.stack([expert["fc.weight"] for expert in experts.values()])
    alone = Consensus(vector="ties", min_active=0, scale=1.0)
    torch.testing.assert_close(
        alone.merge_tensor("fc.weight", base["fc.weight"], stacked),
        TIES().merge_tensor("fc.weight", base["fc.weight"], stacked),
    )


@given(data=model_sets())
def test_limits(data):
    base, experts = data
    none = Consensus(min_active=len(experts) + 1).merge(base, experts)
    assert all(torch.equal(none[name], base[name]) for name in base)
    every = Consensus(min_active=0).merge(base, experts)
    plain = TaskArithmetic(scale=0.3).merge(base, experts)
    for name in base:
        torch.testing.assert_close(every[name], plain[name], rtol=1e-6, atol=1e-6)


@given(seed=st.integers(0, 99))
def test_masks_shrink_as_the_threshold_grows(seed):
    vectors = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))
    vectors[0, :5] = 0
    masks = [tall_masks(vectors, vectors.sum(0), torch.full((3,), k)) for k in (0.0, 0.3, 0.6)]
    assert torch.equal(masks[0], vectors != 0)
    for wide, narrow in pairwise(masks):
        assert not (narrow & ~wide).any()


def test_threshold_of_single_tasks():
    base, experts = models(2)
    merged = Consensus(threshold=0.2, thresholds={"task1": 1e9}, min_active=1).merge(base, experts)
    rows = flat_task_vectors(base, experts)
    total = rows.sum(axis=0)
    active = np.abs(rows[0]) > 0.2 * np.abs(total - rows[0])
    np.testing.assert_allclose(flat(merged), flat(base) + 0.3 * total * active, atol=1e-6)
    with pytest.raises(ValueError, match="unknown tasks: nope"):
        Consensus(thresholds={"nope": 1.0}).merge(base, experts)


@given(shape=st.lists(st.integers(0, 5), max_size=3).map(tuple), seed=st.integers(0, 99))
def test_packed_masks_come_back(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    packed = pack_mask(mask)
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_mask(packed, shape), mask)


@pytest.mark.parametrize("bad", [{"threshold": -0.1}, {"min_active": -1}, {"scale": float("inf")}])
def test_errors(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Consensus(**bad)
