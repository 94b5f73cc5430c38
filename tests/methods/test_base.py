"""What every weight method owes its caller, shown on all of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lightning_merge.methods import (
    DARE,
    DELLA,
    TIES,
    Average,
    Breadcrumbs,
    Coefficient,
    Consensus,
    IsoC,
    IsoCTS,
    ModelStock,
    OutputProjection,
    Slerp,
    TALLCompress,
    TaskArithmetic,
    TSVCompress,
    TSVMerge,
    WeightMethod,
    walk,
)
from lightning_merge.methods.buffers import knowing_buffers
from lightning_merge.methods.plan import plan
from lightning_merge.states import LazyStateDict
from tests.methods.models import SHAPES, flat, model_sets, models

pytestmark = pytest.mark.filterwarnings(
    "ignore:slerp. two tensors", "ignore:TSVMerge. .* matrices have fewer"
)

METHODS = [
    Average(),
    TaskArithmetic(scale=0.4),
    TIES(density=0.3),
    TIES(density=0.3, scope="tensor", combine="sum", scale=0.3),
    DARE(density=0.5),
    DARE(density=0.5, combine="ties", rescale="l1"),
    DELLA(),
    Breadcrumbs(density=0.4, combine="ties"),
    Consensus(min_active=1),
    ModelStock(unit="row"),
    TSVMerge(),
    IsoC(),
    IsoCTS(common_fraction=0.5, convolutions="matrix"),
    Slerp(position=0.5),
    Slerp(position=0.5, of="task_vectors", keep_norm=True),
]
BLOCK_SIZES = ("BLOCK", "LINEAR_BLOCK", "COPIED_BLOCK")
FEW = settings(max_examples=6)  # of each method
EACH = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


def batchnorm(seed=0):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.1, 2)
    net[1].num_batches_tracked.fill_(seed)
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


@EACH
@FEW
@given(data=model_sets(2, 2), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_keys_shapes_dtypes_kept_and_inputs_neither_changed_nor_aliased(method, data, dtype):
    base, experts = data
    base = {n: v.to(dtype) for n, v in base.items()}
    experts = {t: {n: v.to(dtype) for n, v in e.items()} for t, e in experts.items()}
    before = [{n: v.clone() for n, v in s.items()} for s in (base, *experts.values())]
    merged = method.merge(base, experts)
    assert list(merged) == list(base)
    for name, value in merged.items():
        assert value.shape == base[name].shape
        assert value.dtype == dtype
        value += 1  # must reach no input
    for state, copy in zip((base, *experts.values()), before, strict=True):
        assert all(torch.equal(state[n], copy[n]) for n in copy)


def doubled(state):
    return {n: v.double() if v.is_floating_point() else v for n, v in state.items()}


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_work_in_float64_is_that_on_models_of_float64(method, dtype, tmp_path):
    base, experts = models(2, dtype=dtype, shapes={**SHAPES, "bn.running_var": (7,)})
    for steps, state in enumerate((base, *experts.values())):
        state["steps"] = torch.tensor(steps)
    kept = {"coefficients": (Coefficient(pattern="fc.*", value=0.7),)}
    wide = type(method)(**{**vars(method), **kept, "precision": "float64"})
    plain = type(method)(**{**vars(method), **kept})
    exact = plain.merge(doubled(base), {task: doubled(e) for task, e in experts.items()})
    merged = wide.merge(base, experts)
    for name, value in merged.items():
        assert value.dtype == base[name].dtype
        assert torch.equal(value, exact[name].to(value.dtype)), name
    save_file(base, tmp_path / "base.safetensors")
    lazy = wide.merge(LazyStateDict(tmp_path / "base.safetensors"), experts)
    assert all(torch.equal(lazy[name], value) for name, value in merged.items())


@EACH
def test_integer_buffers_are_the_bases_and_statistics_are_averaged(method):
    base, experts = batchnorm(), {t: batchnorm(i) for i, t in enumerate("ab", start=1)}
    base["table"] = torch.tensor([True, False])
    for expert in experts.values():
        expert["table"] = torch.tensor([True, True])
    merged = method.merge(base, experts)
    assert merged["1.num_batches_tracked"] == 0
    assert torch.equal(merged["table"], base["table"])
    for name in ("1.running_mean", "1.running_var"):
        mean = (experts["a"][name].double() + experts["b"][name].double()) / 2
        torch.testing.assert_close(merged[name], mean.float(), rtol=1e-6, atol=0)
    assert (merged["1.running_var"] > 0).all()


@EACH
def test_integer_buffers_that_differ_are_the_first_experts_or_an_error_where_asked(method):
    base, experts = models(2)
    for state, steps in zip((base, *experts.values()), (1, 2, 3), strict=True):
        state["steps"], state["same"] = torch.tensor(steps), torch.tensor([True])
    first = type(method)(**{**vars(method), "on_buffer_mismatch": "first"})
    merged = first.merge(base, experts)
    assert merged["steps"] == 2
    merged["steps"] += 5
    assert experts["task0"]["steps"] == 2
    strict = type(method)(**{**vars(method), "on_buffer_mismatch": "error"})
    with pytest.raises(ValueError, match="buffer 'steps' differs .* experts task0, task1. Merge"):
        strict.merge(base, experts)
    for expert in experts.values():
        expert["steps"] = base["steps"].clone()
    assert strict.merge(base, experts)["steps"] == 1


def test_a_large_scale_leaves_variances_positive():
    base, experts = batchnorm(), {t: batchnorm(i) for i, t in enumerate("ab", start=1)}
    merged = TaskArithmetic(scale=50.0).merge(base, experts)
    assert (merged["1.running_var"] > 0).all()


@EACH
def test_floating_buffers_that_are_named_are_averaged(method):
    base, experts = models(2, shapes={"fc.weight": (4, 3), "bn.scale": (4,)})
    told = type(method)(**{**vars(method), "buffers": ("bn.*",)})
    merged, mean = told.merge(base, experts), Average().merge(base, experts)
    assert torch.equal(merged["bn.scale"], mean["bn.scale"])


def test_methods_within_methods_hear_of_buffers_by_their_exact_names():
    inner = TaskArithmetic(buffers=("kept.*",))
    method = OutputProjection(fallback=inner, heuristics=(TIES(), DARE()))
    told = knowing_buffers(method, ["a[0].scale"])
    for one in (told.fallback, *told.heuristics):
        assert one.treatment("a[0].scale", "floating") == "average"
        assert one.treatment("a0.scale", "floating") == "method"
    assert told.fallback.treatment("kept.x", "floating") == "average"
    assert knowing_buffers(method, []) is method
    assert inner.buffers == ("kept.*",)


@EACH
def test_ties_stay_tied_and_count_once(method):
    base, experts = models(2, shapes={"a": (4, 3), "b": (5,)})
    plain = method.merge(base, experts)
    tied_base = {**base, "c": base["a"]}
    tied_experts = {t: {**e, "c": e["a"]} for t, e in experts.items()}
    merged = method.merge(tied_base, tied_experts)
    assert merged["c"] is merged["a"]
    assert all(torch.equal(merged[n], plain[n]) for n in plain)


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_by_the_last_rounding_only(method, dtype):
    base, experts = models(2, dtype=dtype)
    wide = {n: v.float() for n, v in base.items()}
    wide_experts = {t: {n: v.float() for n, v in e.items()} for t, e in experts.items()}
    merged, reference = method.merge(base, experts), method.merge(wide, wide_experts)
    for name in base:
        assert torch.equal(merged[name], reference[name].to(dtype))


def test_half_base_and_wide_experts():
    base, experts = models(2)
    half = {n: v.half() for n, v in base.items()}
    merged = TaskArithmetic(scale=0.5).merge(half, experts)
    for name in base:
        expected = half[name].double() + 0.5 * sum(
            e[name].double() - half[name].double() for e in experts.values()
        )
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-3, atol=1e-3)


@EACH
@pytest.mark.parametrize("place", ["base", "expert"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_name_owner_and_parameter(method, place, value):
    base, experts = models(2)
    state = base if place == "base" else experts["task1"]
    state["fc.weight"][2, 3] = value
    if place == "base" and isinstance(method, Average):  # its values do not enter
        assert all(bool(tensor.isfinite().all()) for tensor in method.merge(base, experts).values())
        return
    owner = "the base" if place == "base" else "expert 'task1'"
    with pytest.raises(ValueError, match=f"{owner}: parameter 'fc.weight' holds 1 non-finite"):
        method.merge(base, experts)


def test_finite_values_whose_sum_overflows_are_welcome():
    base = {"w": torch.full((4,), 3e38)}
    merged = Average().merge(base, {"a": base, "b": base})
    torch.testing.assert_close(merged["w"], base["w"])


@EACH
def test_differing_experts_are_one_error(method):
    base, experts = models(2)
    del experts["task0"]["fc.bias"]
    experts["task1"]["fc.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"task0.*missing: fc.bias.*task1.*\(2, 2\) vs \(7, 5\)"):
        method.merge(base, experts)


@EACH
@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("place", ["everywhere", "one expert"])
def test_eight_bit_floats_are_one_error_that_tells_what_to_do(
    method, place, dtype, lazily, tmp_path
):
    base, experts = models(2)
    states = {"base": base, **experts}
    for name, state in states.items():
        if place == "everywhere" or name == "task1":
            state["fc.weight"] = state["fc.weight"].to(dtype)
        if lazily:
            save_file(state, tmp_path / name)
    if lazily:
        states = {name: LazyStateDict(tmp_path / name) for name in states}
    base = states.pop("base")
    found = {
        "everywhere": "the base: 1 parameters float8, which cannot be merged: fc.weight",
        "one expert": "expert 'task1': 1 parameters of another kind .* 'fc.weight' float8 vs float",
    }
    with pytest.raises(ValueError, match=f"{found[place]}.*to bfloat16 first"):
        method.merge(base, states)
    for store in (TSVCompress(), TALLCompress()):
        with pytest.raises(ValueError, match=f"{found[place]}.*to bfloat16 first"):
            store.save(tmp_path / "store", base, states)


@EACH
def test_tensors_stay_on_their_device(method, monkeypatch):
    def fail(*_):
        raise AssertionError("a tensor was moved to the CPU")

    monkeypatch.setattr(torch.Tensor, "cpu", fail)
    method.merge(*models(2))


@EACH
def test_streamed_equals_in_memory_bitwise(method, tmp_path, monkeypatch):
    for size in BLOCK_SIZES:
        monkeypatch.setattr(walk, size, 10)
    base, experts = models(2)
    base["count"] = torch.tensor(4)
    for expert in experts.values():
        expert["count"] = torch.tensor(5)
    lazy = {}
    for task, state in {"base": base, **experts}.items():
        save_file(state, tmp_path / f"{task}.safetensors")
        lazy[task] = LazyStateDict(tmp_path / f"{task}.safetensors")
    streamed = method.merge(lazy.pop("base"), lazy)
    merged = method.merge(base, experts)
    assert set(streamed) == set(merged)
    assert all(torch.equal(streamed[n], merged[n]) for n in merged)


def test_one_parameter_is_read_at_a_time():
    base, experts = models(2)
    log = []

    class Logged(dict):
        def __getitem__(self, name):
            log.append(name)
            return super().__getitem__(name)

    stream = Average().stream(base, {t: Logged(e) for t, e in experts.items()})
    names = list(base)
    for name in names:
        log.clear()
        assert next(stream)[0] == name
        # the type checker of the tests looks at the first entry of every mapping
        assert name == names[0] or set(log) <= {names[0], name}


@EACH
@FEW
@given(data=model_sets(2, 2), factor=st.sampled_from([1.0, 0.7]))
def test_blocks_change_nothing(method, data, factor):
    base, experts = data
    method = type(method)(**{**vars(method), "coefficients": (Coefficient(value=factor),)})
    whole = method.merge(base, experts)
    with pytest.MonkeyPatch.context() as patch:
        for size in BLOCK_SIZES:
            patch.setattr(walk, size, 3)
        parts = method.merge(base, experts)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["object", "memory", "file"])
def test_a_base_among_the_experts_is_a_warning_and_nothing_is_read(form, tmp_path):
    base, experts = models(2)
    again = base if form == "object" else {n: v.detach() for n, v in base.items()}
    if form == "file":
        save_file(base, tmp_path / "b")
        base, again = LazyStateDict(tmp_path / "b"), LazyStateDict(tmp_path / "b")
    experts = {**experts, "start": again}
    with pytest.warns(UserWarning, match="expert 'start' is the base itself: all it adds"):
        merged = Average().merge(base, experts)
    for name in SHAPES:
        mean = sum(e[name].double() for e in experts.values()) / 3
        torch.testing.assert_close(merged[name].double(), mean, rtol=1e-5, atol=1e-6)
    with pytest.warns(UserWarning, match="no expert differs from the base, so the merge is the"):
        TaskArithmetic().merge(base, {"a": again, "b": base})


def test_another_expert_with_equal_values_is_not_looked_at(recwarn):
    base, experts = models(2)
    equal = {name: value.clone() for name, value in base.items()}
    Average().merge(base, {**experts, "equal": equal})
    assert not recwarn.list


@EACH
@FEW
@given(data=model_sets(2, 2))
def test_no_change_returns_the_base_bitwise(method, data):
    base, experts = data
    same = {t: {n: v.clone() for n, v in base.items()} for t in experts}
    merged = method.merge(base, same)
    if not isinstance(method, Average):
        assert all(torch.equal(merged[n], base[n]) for n in base)
    for name in base:
        torch.testing.assert_close(merged[name], base[name], rtol=1e-6, atol=0)


@EACH
@FEW
@given(data=model_sets(2, 4))
def test_order_of_experts_does_not_matter(method, data):
    base, experts = data
    if isinstance(method, Slerp):
        experts = dict(list(experts.items())[:2])
    turned = dict(reversed(list(experts.items())))
    forth, back = method.merge(base, experts), method.merge(base, turned)
    for name in base:
        torch.testing.assert_close(forth[name], back[name], rtol=1e-6, atol=1e-6)


@EACH
def test_include_and_exclude(method):
    base, experts = models(2)
    plain = method.merge(base, experts)
    chosen = type(method)(**{**vars(method), "include": ("fc.*",), "exclude": ("*.bias",)})
    merged = chosen.merge(base, experts)
    mean = Average().merge(base, experts)
    for name in ("conv.weight", "fc.bias", "logit_scale"):
        assert torch.equal(merged[name], mean[name])
    if method != METHODS[2]:  # a threshold over the whole model depends on what takes part
        assert torch.equal(merged["fc.weight"], plain["fc.weight"])
    kept = type(method)(**{**vars(method), "exclude": ("conv.*",), "otherwise": "base"})
    assert torch.equal(kept.merge(base, experts)["conv.weight"], base["conv.weight"])


@EACH
def test_coefficients_scale_task_vectors(method):
    base, experts = models(2)
    rules = (
        Coefficient(value=0.5, pattern="fc.*", task="task0"),
        Coefficient(value=2.0, pattern="fc.*"),
    )
    merged = type(method)(**{**vars(method), "coefficients": rules}).merge(base, experts)
    factors = {"task0": 0.5, "task1": 2.0}
    by_hand = {
        t: {
            n: base[n] + factors[t] * (v - base[n]) if n.startswith("fc") else v
            for n, v in e.items()
        }
        for t, e in experts.items()
    }
    reference = method.merge(base, by_hand)
    for name in base:
        torch.testing.assert_close(merged[name], reference[name], rtol=1e-5, atol=1e-6)


def test_coefficient_errors():
    base, experts = models(2)
    rules = (Coefficient(value=1.0, task="nope"), Coefficient(value=1.0, pattern="body.*"))
    with pytest.raises(ValueError, match=r"task 'nope' is not among.*'body\.\*' matches no") as _:
        TaskArithmetic(coefficients=rules).merge(base, experts)
    with pytest.raises(ValueError, match="finite"):
        Coefficient(value=float("nan"))


@pytest.mark.parametrize(
    ("method", "option"),
    [
        (TIES(include=("fc.*", "nope.*")), "include"),
        (Average(buffers=("nope.*",)), "buffers"),
        (TSVMerge(split={"nope.*": 3}), "split"),
        (IsoC(split={"fc.weight": 1, "nope.*": 3}), "split"),
        (Slerp(positions={"fc.*": 0.2, "nope.*": 0.3}), "positions"),
    ],
)
def test_patterns_that_match_nothing_are_errors(method, option):
    base, experts = models(2)
    message = rf"^{option}: pattern 'nope\.\*' matches no parameter.*parameters are: conv\.weight"
    with pytest.raises(ValueError, match=message):
        method.merge(base, experts)
    with pytest.raises(ValueError, match=message):
        plan(method, base, experts)


def test_a_pattern_that_excludes_nothing_is_a_warning():
    base, experts = models(2)
    method = Average(exclude=("*.bias", "nope.*"))
    with pytest.warns(UserWarning, match=r"exclude: no parameter matches 'nope\.\*'; nothing"):
        merged = method.merge(base, experts)
    expected = Average(exclude=("*.bias",)).merge(base, experts)
    assert all(torch.equal(merged[name], expected[name]) for name in base)


def test_an_empty_model_has_nothing_that_a_pattern_could_match():
    assert Average(include=("fc.*",)).merge({}, {"a": {}}) == {}


def test_abstract_base_cannot_be_made():
    with pytest.raises(TypeError, match="merge_tensor"):
        WeightMethod()


@EACH
def test_frozen(method):
    with pytest.raises(AttributeError):
        method.scale = 2.0


def test_result_has_no_graph():
    base, experts = models(1)
    base = {n: v.requires_grad_() for n, v in base.items()}
    merged = TaskArithmetic().merge(base, experts)
    assert not any(v.requires_grad for v in merged.values())
    assert flat({n: v.detach() for n, v in base.items()}).size
