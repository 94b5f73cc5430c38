from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_merge.functional.ties import BLOCK, sign_consensus
from lightning_merge.methods import TIES, Average, walk
from lightning_merge.methods.ties import agreeing_task_vectors
from tests.methods.models import flat, flat_task_vectors, model_sets, models

DENSITIES = st.sampled_from([0.05, 0.2, 0.5, 0.77, 1.0])


def reference(task_vectors, density, combine, zero_sign="majority", weights=None):
    """TIES on flat task vectors (T, N), in NumPy: the merged task vector."""
    weights = np.ones(len(task_vectors)) if weights is None else np.asarray(weights)
    trimmed = np.zeros_like(task_vectors)
    for row, out in zip(task_vectors, trimmed, strict=True):
        if len(row):
            kept = np.argsort(-np.abs(row), kind="stable")[: max(1, round(density * len(row)))]
            out[kept] = row[kept]
    signs = np.sign(weights @ trimmed)
    filler = {"majority": np.sign(signs.sum()), "positive": 1.0, "none": 0.0}[zero_sign]
    signs[signs == 0] = filler
    agreeing = (np.sign(trimmed) == signs) & (trimmed != 0)
    agreeing &= weights[:, None] > 0
    chosen = np.where(agreeing, trimmed, 0)
    if combine == "max":
        return np.abs(chosen).max(axis=0, initial=0) * signs
    total, share = weights @ chosen, weights @ agreeing
    return total if combine == "sum" else total / np.where(share > 0, share, 1)


@given(
    data=model_sets(integers=True),
    density=DENSITIES,
    combine=st.sampled_from(["mean", "sum", "max"]),
    zero_sign=st.sampled_from(["majority", "positive", "none"]),
    scale=st.sampled_from([1.0, 0.3, -2.0]),
)
def test_global_scope_against_numpy_with_ties_everywhere(data, density, combine, zero_sign, scale):
    base, experts = data
    method = TIES(density=density, combine=combine, zero_sign=zero_sign, scale=scale)
    merged = flat(method.merge(base, experts))
    expected = flat(base) + scale * reference(
        flat_task_vectors(base, experts), density, combine, zero_sign
    )
    np.testing.assert_allclose(merged, expected, rtol=1e-6, atol=1e-6)


@given(data=model_sets(), density=DENSITIES)
def test_global_scope_against_numpy(data, density):
    base, experts = data
    merged = flat(TIES(density=density).merge(base, experts))
    expected = flat(base) + reference(flat_task_vectors(base, experts), density, "mean")
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)


@given(data=model_sets(integers=True), density=DENSITIES)
def test_tensor_scope_ranks_each_parameter(data, density):
    base, experts = data
    merged = TIES(density=density, scope="tensor").merge(base, experts)
    for name in base:
        one = {name: base[name]}
        ones = {task: {name: expert[name]} for task, expert in experts.items()}
        expected = flat(one) + reference(flat_task_vectors(one, ones), density, "mean")
        np.testing.assert_allclose(flat({name: merged[name]}), expected, rtol=1e-6, atol=1e-6)
        # of a model with one tensor both scopes are the same
        assert torch.equal(merged[name], TIES(density=density).merge(one, ones)[name])


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("size", range(1, 12))
def test_kept_count_is_exact_when_all_magnitudes_tie(scope, size):
    base = {"w": torch.zeros(size)}
    merged = TIES(density=0.3, scope=scope).merge(base, {"a": {"w": -torch.ones(size)}})
    kept = max(1, round(0.3 * size))
    assert merged["w"].tolist() == [-1.0] * kept + [0.0] * (size - kept)


@given(data=model_sets(max_experts=1))
def test_one_expert_with_all_kept_is_returned(data):
    base, experts = data
    merged = TIES(density=1.0).merge(base, experts)
    for name in base:
        torch.testing.assert_close(merged[name], experts["task0"][name], rtol=1e-6, atol=1e-6)


@given(data=model_sets())
def test_all_of_one_sign_and_all_kept_is_the_mean(data):
    base, experts = data
    up = {t: {n: base[n] + (e[n] - base[n]).abs() for n in e} for t, e in experts.items()}
    merged, mean = TIES(density=1.0).merge(base, up), Average().merge(base, up)
    for name in base:
        torch.testing.assert_close(merged[name], mean[name], rtol=1e-5, atol=1e-6)


@given(data=model_sets(integers=True), density=DENSITIES)
def test_turning_every_task_vector_turns_the_result(data, density):
    base, experts = data  # the base is zero
    turned = {t: {n: -v for n, v in e.items()} for t, e in experts.items()}
    forth, back = (
        TIES(density=density).merge(base, experts),
        TIES(density=density).merge(base, turned),
    )
    assert all(torch.equal(forth[n], -back[n]) for n in base)


@given(data=model_sets(), density=DENSITIES)
def test_entry_lies_between_zero_and_the_extreme_of_its_sign(data, density):
    base, experts = data
    update = flat(TIES(density=density).merge(base, experts)) - flat(base)
    rows = flat_task_vectors(base, experts)
    assert (update <= np.maximum(rows.max(axis=0), 0) + 1e-6).all()
    assert (update >= np.minimum(rows.min(axis=0), 0) - 1e-6).all()


@given(data=model_sets(max_experts=3), density=DENSITIES, power=st.integers(-3, 3))
def test_scaling_every_task_vector_scales_the_update(data, density, power):
    base, experts = data
    zero = {n: torch.zeros_like(v) for n, v in base.items()}
    once = {t: {n: e[n] - base[n] for n in e} for t, e in experts.items()}
    more = {t: {n: 2.0**power * v for n, v in e.items()} for t, e in once.items()}
    small, large = (TIES(density=density).merge(zero, e) for e in (once, more))
    assert all(torch.equal(large[n], 2.0**power * small[n]) for n in base)


def test_identical_experts_give_the_trimmed_task_vector():
    base, experts = models(1)
    copies = {f"copy{i}": experts["task0"] for i in range(4)}
    one, four = TIES(density=0.3).merge(base, experts), TIES(density=0.3).merge(base, copies)
    for name in base:
        torch.testing.assert_close(four[name], one[name])


def test_majority_sign_is_of_the_whole_model():
    base = {"a": torch.zeros(1), "b": torch.zeros(3)}
    experts = {
        "x": {"a": torch.ones(1), "b": -torch.ones(3)},
        "y": {"a": -torch.ones(1), "b": -torch.ones(3)},
    }
    assert TIES(density=1.0).merge(base, experts)["a"].item() == -1.0
    assert TIES(density=1.0, zero_sign="positive").merge(base, experts)["a"].item() == 1.0
    assert TIES(density=1.0, zero_sign="none").merge(base, experts)["a"].item() == 0.0
    # of the parameter alone there is no majority
    assert TIES(density=1.0, scope="tensor").merge(base, experts)["a"].item() == 0.0


def test_statistics_and_excluded_parameters_do_not_rank():
    base = {"w": torch.zeros(4), "bn.running_var": torch.ones(100), "big": torch.zeros(100)}
    expert = {"w": torch.arange(4.0), "bn.running_var": torch.ones(100) * 9, "big": torch.ones(100)}
    merged = TIES(density=0.5, exclude=("big",), otherwise="base").merge(base, {"a": expert})
    assert merged["w"].tolist() == [0.0, 0.0, 2.0, 3.0]
    assert (merged["big"] == 0).all()


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, 20.0, float("nan")])
def test_density_is_a_fraction(density):
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
        TIES(density=density)


def test_order_of_parameters_does_not_decide_ties():
    base = {"b": torch.zeros(3), "a": torch.zeros(3)}
    expert = {name: torch.ones(3) for name in base}
    forth = TIES(density=0.5).merge(base, {"x": expert})
    back = TIES(density=0.5).merge(dict(reversed(base.items())), {"x": expert})
    assert forth["a"].tolist() == back["a"].tolist() == [1.0, 1.0, 1.0]
    assert forth["b"].tolist() == back["b"].tolist() == [0.0, 0.0, 0.0]


def test_ties_for_the_last_place_within_many_blocks():
    # few magnitudes, so that thousands tie and the last that stays lies in the midst of a block
    generator = torch.Generator().manual_seed(0)
    size = 3 * walk.BLOCK + 1234
    rows = torch.randint(-3, 4, (2, size), generator=generator).float()
    merged = TIES(density=0.5, scale=1.0).merge(
        {"w": torch.zeros(size)}, {str(t): {"w": row.clone()} for t, row in enumerate(rows)}
    )["w"]
    order = np.argsort(-rows.abs().numpy(), axis=1, kind="stable")[:, : round(0.5 * size)]
    kept = np.zeros(rows.shape, np.float32)
    np.put_along_axis(kept, order, 1.0, axis=1)
    expected = sign_consensus(rows * torch.from_numpy(kept))
    assert torch.equal(merged, expected)
    assert (rows.abs() == 2).sum(1).min() > 4 * walk.BLOCK // 5


def test_agreeing_task_vectors_of_a_parameter_longer_than_a_block():
    generator = torch.Generator().manual_seed(0)
    size = BLOCK + 2048
    base = {"w": torch.randn(size, generator=generator)}
    experts = {t: {"w": base["w"] + torch.randn(size, generator=generator)} for t in "abc"}
    found = dict(agreeing_task_vectors(TIES(density=0.3), base, experts))["w"]
    merged = TIES(density=0.3).merge(base, experts)["w"] - base["w"]
    mean = found.sum(0) / (found != 0).sum(0).clamp_min(1)
    torch.testing.assert_close(mean, merged, atol=1e-6, rtol=1e-5)


@given(
    data=model_sets(integers=True, min_experts=2),
    density=DENSITIES,
    scope=st.sampled_from(["global", "tensor"]),
    combine=st.sampled_from(["mean", "sum"]),
    zero_sign=st.sampled_from(["majority", "positive", "none"]),
    seed=st.integers(0, 99),
)
def test_weights_against_numpy(data, density, scope, combine, zero_sign, seed):
    base, experts = data
    # eighths: sums of them cancel exactly here and there, and in any order
    drawn = np.random.default_rng(seed).integers(0, 9, len(experts)) / 8
    drawn[0] += 0.125
    weights = dict(zip(experts, drawn.tolist(), strict=True))
    given_backwards = dict(reversed(list(weights.items())))
    method = TIES(
        density=density,
        scope=scope,
        combine=combine,
        zero_sign=zero_sign,
        weights=given_backwards,
    )
    merged = method.merge(base, experts)
    parts = [[name] for name in base] if scope == "tensor" else [list(base)]
    for names in parts:
        vectors = flat_task_vectors(
            {n: base[n] for n in names}, {t: {n: e[n] for n in names} for t, e in experts.items()}
        )
        expected = reference(vectors, density, combine, zero_sign, drawn)
        found = flat({n: merged[n] for n in names})
        np.testing.assert_allclose(found, expected, atol=1e-5)
    if scope == "tensor":
        in_their_order = replace(method, weights=weights)
        for name, value in base.items():
            stacked = torch.stack([e[name] for e in experts.values()])
            whole = in_their_order.merge_tensor(name, value, stacked)
            torch.testing.assert_close(whole, merged[name])


@given(data=model_sets(min_experts=2), scope=st.sampled_from(["global", "tensor"]))
def test_equal_weights_change_no_bit_of_the_mean(data, scope):
    base, experts = data
    plain = TIES(density=0.5, scope=scope)
    ones = replace(plain, weights=dict.fromkeys(experts, 1.0))
    expected, found = plain.merge(base, experts), ones.merge(base, experts)
    assert all(torch.equal(found[name], expected[name]) for name in base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"a": -1.0, "b": 2.0}}, "finite, at least 0, and not all 0.*coefficient"),
        ({"weights": {"a": 0.0, "b": 0.0}}, "not all 0"),
        ({"weights": {"a": float("nan")}}, "finite"),
        ({"weights": {"a": 1.0}, "combine": "max"}, "no part in combine: max"),
    ],
)
def test_weights_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        TIES(**options)


def test_weights_must_name_the_experts():
    base, experts = models(2)
    with pytest.raises(ValueError, match="every expert once: task0, task1; missing: task1; unknow"):
        TIES(weights={"task0": 1.0, "x": 1.0}).merge(base, experts)
