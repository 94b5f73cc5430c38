import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_merge.functional.dare import bernoulli, random_words
from lightning_merge.methods import DARE, TIES, TaskArithmetic, walk
from tests.methods.models import flat, model_sets, models


@given(data=model_sets(), seed=st.integers(0, 99))
def test_density_one_is_the_plain_method(data, seed):
    base, experts = data
    plain = TaskArithmetic(scale=0.3).merge(base, experts)
    merged = DARE(density=1.0, seed=seed).merge(base, experts)
    for name in base:
        torch.testing.assert_close(merged[name], plain[name], rtol=1e-6, atol=1e-6)
    ties = TIES(density=1.0, scope="tensor").merge(base, experts)
    merged = DARE(density=1.0, seed=seed, combine="ties", scale=1.0).merge(base, experts)
    assert all(torch.equal(merged[name], ties[name]) for name in base)


@pytest.mark.parametrize("rescale", ["inverse", "l1"])
@pytest.mark.parametrize("combine", ["sum", "ties"])
def test_matrices_alone_lose_entries_where_asked(combine, rescale):
    base, experts = models(3)
    options = {"combine": combine, "rescale": rescale}
    merged = DARE(density=0.5, targets="matrices", **options).merge(base, experts)
    dropped = DARE(density=0.5, **options).merge(base, experts)
    plain = DARE(density=1.0, **options).merge(base, experts)
    for name, value in merged.items():
        assert torch.equal(value, (dropped if value.ndim == 2 else plain)[name]), name
    assert not torch.equal(dropped["fc.bias"], plain["fc.bias"])
    alone = DARE(density=0.5, targets="matrices", **options)
    stacked = torch.stack([expert["fc.bias"] for expert in experts.values()])
    value = alone.merge_tensor("fc.bias", base["fc.bias"], stacked)
    torch.testing.assert_close(value, plain["fc.bias"])


def test_kept_entries_are_divided_by_the_density():
    base, expert = {"w": torch.zeros(1000)}, {"w": torch.arange(1.0, 1001.0)}
    merged = DARE(density=0.25, scale=1.0).merge(base, {"a": expert})["w"]
    kept = merged != 0
    assert torch.equal(merged[kept], 4 * expert["w"][kept])
    # binomial: within four standard deviations of the expected 250
    assert abs(int(kept.sum()) - 250) < 4 * (1000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("combine", ["sum"])
def test_mean_over_seeds_is_the_task_vector(combine):
    base, experts = models(2, shapes={"w": (5, 3)})
    update = flat(TaskArithmetic(scale=1.0).merge(base, experts)) - flat(base)
    num, density = 400, 0.3
    draws = [
        flat(DARE(density=density, scale=1.0, combine=combine, seed=seed).merge(base, experts))
        - flat(base)
        for seed in range(num)
    ]
    rows = np.stack([flat(e) - flat(base) for e in experts.values()])
    error = np.sqrt((rows**2).sum(axis=0) * (1 - density) / density / num)
    assert (np.abs(np.mean(draws, axis=0) - update) < 4.5 * error).all()


def test_masks_depend_on_seed_task_and_name_alone():
    base, experts = models(3)
    merged = DARE(density=0.5).merge(base, experts)
    # not on the order of parameters or experts, the other parameters, or the global generators
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    turned = {n: base[n] for n in reversed(base)}
    again = DARE(density=0.5).merge(turned, dict(reversed(list(experts.items()))))
    for name in base:
        torch.testing.assert_close(again[name], merged[name], rtol=1e-6, atol=1e-6)
    words = random_words(0, "a", "w", 100)
    assert torch.equal(random_words(0, "a", "w", 64), words[:64])
    for other in (random_words(1, "a", "w", 100), random_words(0, "b", "w", 100)):
        assert not torch.equal(other, words)


@pytest.mark.parametrize(("rescale", "order"), [("l1", 1), ("l2", 2)])
def test_norm_is_restored(rescale, order):
    base, experts = models(1, shapes={"w": (40,)})
    merged = DARE(density=0.5, scale=1.0, rescale=rescale).merge(base, experts)["w"] - base["w"]
    before = (experts["task0"]["w"] - base["w"]).norm(p=order)
    torch.testing.assert_close(merged.norm(p=order), before, rtol=1e-5, atol=1e-6)


def test_rescale_none_keeps_entries():
    base, expert = {"w": torch.zeros(50)}, {"w": torch.ones(50)}
    merged = DARE(density=0.5, scale=1.0, rescale="none").merge(base, {"a": expert})["w"]
    assert set(merged.tolist()) == {0.0, 1.0}


@given(density=st.sampled_from([0.01, 0.5, 0.99, 1.0]))
def test_both_kinds_of_probability_agree(density):
    words = random_words(0, "a", "w", 2001)
    one, each = bernoulli(density, words), bernoulli(torch.full((2001,), density), words)
    assert int((one != each).sum()) <= 1  # float32 knows a probability to 2^-24
    assert abs(float(one.float().mean()) - density) <= 4 * (density * (1 - density) / 2001) ** 0.5


@pytest.mark.parametrize("density", [0.0, 1.1])
def test_density_errors(density):
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
        DARE(density=density)


@pytest.mark.parametrize("combine", ["sum", "ties"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_dropped_entry_that_is_not_finite_is_named(combine, value):
    base, experts = models(2)
    # dropped with a probability of all but certainty, were it not for the check
    experts["task1"]["fc.weight"].view(-1)[-1] = value
    with pytest.raises(ValueError, match=r"expert 'task1': parameter 'fc.weight' holds 1 non"):
        DARE(density=1e-6, combine=combine).merge(base, experts)


def test_kept_entries_of_many_blocks_are_those_of_the_words():
    size = (1 << 17) + 16411
    base, expert = {"w": torch.zeros(size)}, {"w": torch.arange(1.0, size + 1)}
    merged = DARE(density=0.3, scale=0.3, seed=3).merge(base, {"a": expert})["w"]
    kept = random_words(3, "a", "w", size).double() < 0.3 * 2**32 - 2**31
    torch.testing.assert_close(merged, expert["w"] * kept, rtol=1e-6, atol=0)


def test_where_task_vectors_cancel_the_sign_is_that_of_most_entries_of_the_parameter():
    size = 2 * walk.BLOCK + 100
    one, other = -torch.ones(size), -torch.ones(size)
    one[-100:] = 1.0  # in the last block there is nothing but cancellation
    base, experts = {"w": torch.zeros(size)}, {"a": {"w": one}, "b": {"w": other}}
    merged = DARE(density=1.0, combine="ties", scale=1.0).merge(base, experts)["w"]
    assert torch.equal(merged, -torch.ones(size))


@pytest.mark.parametrize("most", [-1.0, 1.0, 0.0])
def test_cancelled_entries_of_every_block_are_settled(most):
    size = 2 * walk.BLOCK + 100
    one, other = torch.full((size,), most), torch.full((size,), most)
    places = [3, walk.BLOCK - 1, walk.BLOCK, size - 1]
    one[places], other[places] = 2.0, -2.0
    base, experts = {"w": torch.zeros(size)}, {"a": {"w": one}, "b": {"w": other}}
    merged = DARE(density=1.0, combine="ties", scale=1.0).merge(base, experts)["w"]
    expected = torch.full((size,), most)
    expected[places] = 2.0 * most
    assert torch.equal(merged, expected)
    tied = TIES(density=1.0, scope="tensor").merge(base, experts)["w"]
    assert torch.equal(merged, tied)


def test_a_parameter_merged_as_one_tensor_is_settled_too():
    base = torch.zeros(4)
    experts = torch.tensor([[-1.0, -1.0, -1.0, 2.0], [-1.0, -1.0, -1.0, -2.0]])
    method = DARE(density=1.0, combine="ties", scale=1.0)
    bound = method.bind({"w": base}, {"a": {"w": experts[0]}, "b": {"w": experts[1]}})
    assert bound.merge_tensor("w", base, experts).tolist() == [-1.0, -1.0, -1.0, -2.0]
