import copy
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import lightning_merge.calibrating as calibrating
from lightning_merge import ExpertPool, MergedModel, merge_experts
from lightning_merge.correction import CorrectionOptions
from lightning_merge.methods import Average, OutputProjection, TaskArithmetic, TSVMerge
from lightning_merge.networks import representation, split_state
from lightning_merge.runtime import Runtime, memory_in_use
from tests.networks import KINDS, MLP, make, tuned

TASKS = ("a", "b", "c")


def experts_of(base, head, sizes=(3, 5, 2)):
    """Experts with heads of different sizes, so that nothing depends on equal ones."""
    experts = {}
    for seed, (task, size) in enumerate(zip(TASKS, sizes, strict=True)):
        expert = tuned(base, seed)
        _resize_last_linear(expert, head, size)
        experts[task] = expert
    return experts


def _resize_last_linear(network, head, size):
    name, layer = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.".startswith(f"{head}.")
    ][-1]
    parent, _, leaf = name.rpartition(".")
    network.get_submodule(parent)._modules[leaf] = nn.Linear(layer.in_features, size)


def outputs(network, x):
    found = network(x)
    return found["logits"] if isinstance(found, dict) else found


@pytest.fixture(params=KINDS)
def setting(request):
    base, head, shape = make(request.param)
    inputs = {task: torch.randn(n, *shape) for task, n in zip(TASKS, (33, 20, 17), strict=True)}
    return base, head, experts_of(base, head), inputs


def test_any_network_is_merged_and_corrected(setting):
    base, head, experts, inputs = setting
    model = merge_experts(experts, Average(), inputs, base=base, head=head, batch_size=8)
    x = inputs["a"][:4]
    one_hot = {"b": 1.0}
    steered = model.with_preference(one_hot)
    answers = steered(x)
    assert [outputs_of(value).shape for value in answers.values()] == [(4, 3), (4, 5), (4, 2)]
    for task in TASKS:
        alone = model.with_preference(one_hot, task)
        assert set(alone.state_dict()) == set(experts[task].state_dict())
        assert type(alone) is type(base)
        torch.testing.assert_close(outputs(alone, x), outputs_of(answers[task]))
        torch.testing.assert_close(outputs(alone, x), outputs_of(steered(x, task)))


def outputs_of(found):
    return found["logits"] if isinstance(found, dict) else found


def test_the_correction_is_the_papers_equation_on_the_features(setting):
    base, head, experts, inputs = setting
    options = CorrectionOptions(
        beta=0.5,
        beta_mode="absolute",
        prior="identity",
        task_scale="none",
        metric="representation",
    )
    model = merge_experts(
        experts, None, inputs, base=base, head=head, correction=options, batch_size=7
    )
    p = {"a": 0.2, "b": 0.5, "c": 0.3}
    numerator, denominator = 0.0, 0.0
    for task in TASKS:
        merged = model.uncorrected(task)
        zm = representation(merged, head, inputs[task]).double().numpy().T
        zi = representation(experts[task], head, inputs[task]).double().numpy().T
        numerator = numerator + p[task] * (zi @ zm.T + 0.5 * np.eye(len(zm)))
        denominator = denominator + p[task] * (zm @ zm.T + 0.5 * np.eye(len(zm)))
    expected = numerator @ np.linalg.inv(denominator)
    found = model.correction.solve(p).weight.numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_folding_equals_correcting_the_representation(setting):
    base, head, experts, inputs = setting
    model = merge_experts(experts, None, inputs, base=base, head=head)
    p = {"a": 0.2, "b": 0.5, "c": 0.3}
    weight = model.correction.solve(p).weight.float()
    for task in TASKS:
        network = model.uncorrected(task)
        x = inputs[task][:5]
        own = copy.deepcopy(network)
        first = next(m for m in own.get_submodule(head).modules() if isinstance(m, nn.Linear))
        first.register_forward_pre_hook(lambda module, args: (args[0] @ weight.T,))
        expected = outputs(own, x)
        torch.testing.assert_close(
            outputs(model.with_preference(p, task), x), expected, rtol=1e-4, atol=1e-4
        )


def test_saved_and_loaded_is_the_same(setting, tmp_path):
    base, head, experts, inputs = setting
    model = merge_experts(experts, None, inputs, base=base, head=head)
    model.save(tmp_path / "merged")
    loaded = MergedModel.load(tmp_path / "merged", module=base)
    p = {"a": 0.5, "c": 0.5}
    x = inputs["a"][:3]
    for task in TASKS:
        assert torch.equal(
            outputs(model.with_preference(p, task), x), outputs(loaded.with_preference(p, task), x)
        )
    assert loaded.options == model.options
    assert loaded.tasks == model.tasks


def test_a_pool_and_modules_give_the_same(setting, tmp_path):
    base, head, experts, inputs = setting
    pool = ExpertPool.create(tmp_path / "pool", base, head)
    for task in TASKS:
        pool.add(task, experts[task], calibration=inputs[task])
    method = TaskArithmetic(scale=0.4)
    from_pool = merge_experts(pool, method, module=base)
    in_memory = merge_experts(experts, method, inputs, base=base, head=head)
    for name, value in split_state(from_pool.network, head)[0].items():
        assert torch.equal(value, split_state(in_memory.network, head)[0][name])
    for task in TASKS:
        for name, value in from_pool.statistics[task].tensors().items():
            assert torch.equal(value, in_memory.statistics[task].tensors()[name])


def test_dropping_and_adding_a_task_is_exact(setting):
    base, head, experts, inputs = setting
    model = merge_experts(experts, None, inputs, base=base, head=head)
    p = {"a": 0.3, "c": 0.7}
    before = model.correction.solve({**p, "b": 0.4}).weight
    kept = {task: model.statistics[task] for task in p}
    fresh = model.options.build(kept, {task: model.linear_heads()[task] for task in p})
    # One metric and no search: then a dropped task is one without weight.
    options = CorrectionOptions(metric="representation", prior="procrustes", beta=1e-2)
    plain = replace(model, options=options, heads=dict(model.heads), statistics=model.statistics)
    silent = plain.correction.solve(p).weight
    torch.testing.assert_close(
        model.drop_task("b").correction.solve(p).weight, fresh.solve(p).weight
    )
    assert model.tasks == ["a", "c"]
    torch.testing.assert_close(replace(model, options=options).correction.solve(p).weight, silent)
    model.add_task("b", experts["b"], inputs["b"])
    torch.testing.assert_close(model.correction.solve({**p, "b": 0.4}).weight, before)


def test_batch_norm_is_reestimated_exactly():
    base, head, shape = make("resnet")
    experts = experts_of(base, head)
    inputs = {task: torch.randn(12, *shape) + i for i, task in enumerate(TASKS)}
    model = merge_experts(experts, None, inputs, base=base, head=head, batch_size=9)
    averaged = merge_experts(
        experts, None, inputs, base=base, head=head, batch_norm="average", batch_size=9
    )
    # The first batch norm sees the same values whatever the batches are.
    convolution, norm = model.network.conv1[0], model.network.conv1[1]
    values = convolution(torch.cat(list(inputs.values())))
    variance = values.var((0, 2, 3), correction=0)
    torch.testing.assert_close(norm.running_mean, values.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-4, atol=1e-5)
    expected = torch.stack([e.conv1[1].running_mean for e in experts.values()]).mean(0)
    torch.testing.assert_close(averaged.network.conv1[1].running_mean, expected)


def test_one_expert_is_in_memory_at_a_time(tmp_path, monkeypatch):
    base = MLP()
    pool = ExpertPool.create(tmp_path, base, "net.9")
    for seed, task in enumerate(TASKS):
        pool.add(task, tuned(base, seed), calibration=torch.randn(30, 6))
    rows = []
    monkeypatch.setattr(
        calibrating,
        "representation",
        lambda network, head, batch: (
            rows.append(len(batch)) or representation(network, head, batch)
        ),
    )
    merge_experts(pool, module=base, batch_size=8)
    # Two networks see every batch once, and no batch is larger than was asked for.
    assert rows == [8, 8, 8, 8, 8, 8, 6, 6] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    base = MLP().to(dtype)
    experts = {task: tuned(base, seed) for seed, task in enumerate(TASKS)}
    inputs = {task: torch.randn(20, 6, dtype=dtype) for task in TASKS}
    model = merge_experts(experts, None, inputs, base=base, head="net.9")
    steered = model.with_preference({"a": 1.0}, "a")
    assert all(value.dtype == dtype for value in steered.state_dict().values())
    assert torch.isfinite(steered(inputs["a"])).all()


BAD = {
    "one expert": (
        lambda e, i: ({"a": e["a"]}, i),
        {},
        "at least two experts, found 1",
    ),
    "unknown task": (lambda e, i: (e, i), {"tasks": ["a", "x"]}, "unknown tasks \\['x'\\]"),
    "task twice": (lambda e, i: (e, i), {"tasks": ["a", "a"]}, "named twice"),
    "no calibration": (
        lambda e, i: (e, {"a": i["a"]}),
        {},
        "no calibration inputs for b, c, which the correction needs",
    ),
    "empty calibration": (
        lambda e, i: (e, {**i, "b": torch.zeros(0, 6)}),
        {},
        "calibration inputs are empty",
    ),
    "NaN features": (
        lambda e, i: (e, {**i, "b": torch.full((4, 6), float("nan"))}),
        {},
        "features",
    ),
    "unknown head": (lambda e, i: (e, i), {"head": "fc"}, "unknown path 'fc'"),
    "no linear head": (lambda e, i: (e, i), {"head": "net.1"}, "no nn.Linear|no parameters"),
    "no base": (lambda e, i: (e, i), {"base": None}, "need base="),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, options, message = BAD[name]
    base = MLP()
    experts = {task: tuned(base, seed) for seed, task in enumerate(TASKS)}
    inputs = {task: torch.randn(9, 6) for task in TASKS}
    experts, inputs = change(experts, inputs)
    arguments = {"base": base, "head": "net.9", **options}
    with pytest.raises(ValueError, match=message):
        merge_experts(experts, None, inputs, **arguments)


def test_a_merge_without_correction_says_so_when_steered():
    base = MLP()
    experts = {task: tuned(base, seed) for seed, task in enumerate(TASKS)}
    model = merge_experts(experts, base=base, head="net.9", correction=None)
    assert model.uncorrected()(torch.randn(2, 6), "a").shape == (2, 3)
    with pytest.raises(ValueError, match="no correction statistics for a, b, c"):
        model.with_preference({"a": 1.0})


@pytest.mark.parametrize(
    ("preference", "error", "message"),
    [
        ({"x": 1.0}, KeyError, "unknown tasks"),
        ({"a": -1.0}, ValueError, "'a' is -1.0"),
        ({"a": float("nan")}, ValueError, "'a' is nan"),
        ({"a": 0.0}, ValueError, "zero"),
        (torch.ones(2), ValueError, "2 weights for the 3 tasks"),
    ],
)
def test_bad_preferences(preference, error, message):
    base = MLP()
    experts = {task: tuned(base, seed) for seed, task in enumerate(TASKS)}
    inputs = {task: torch.randn(9, 6) for task in TASKS}
    model = merge_experts(experts, None, inputs, base=base, head="net.9")
    with pytest.raises(error, match=message):
        model.with_preference(preference)
    with pytest.raises(KeyError, match="unknown task 'x'"):
        model.with_preference({"a": 1.0}, "x")


def test_the_record_has_the_merge_report(tmp_path):
    base = make("mlp")[0]
    experts = experts_of(base, "net.9")
    options = {"base": base, "head": "net.9", "correction": None}
    model = merge_experts(experts, TSVMerge(), **options)
    vectors = [
        torch.cat(
            [
                (value - split_state(base, "net.9")[0][name]).flatten()
                for name, value in split_state(expert, "net.9")[0].items()
            ]
        )
        for expert in experts.values()
    ]
    np.testing.assert_allclose(
        model.report["total"]["norms"], [float(v.norm()) for v in vectors], rtol=1e-4
    )
    assert model.report["fallback"]["mean"]["names"][0] == "net.0.bias"
    assert len(model.report["layers"]) == 5
    model.save(tmp_path / "m")
    manifest = json.loads((tmp_path / "m" / "merged.json").read_text())
    assert manifest["merge"] == model.report
    assert MergedModel.load(tmp_path / "m", module=base).report == model.report
    assert merge_experts(experts, report="off", **options).report == {}
    brief = merge_experts(experts, report="brief", **options).report
    assert "singular_interference" in model.report["total"]
    assert "singular_interference" not in brief["total"]


def test_experts_of_another_base():
    base = make("mlp")[0]
    experts = {"near": tuned(base, 0), "far": tuned(make("mlp")[0], 1, amount=2.0)}
    options = {"base": base, "head": "net.9", "correction": None}
    with pytest.warns(UserWarning, match="'far' is implausibly far from the base"):
        merge_experts(experts, **options)
    with pytest.raises(ValueError, match="'far' is implausibly far from the base"):
        merge_experts(experts, same_base="error", **options)
    with pytest.warns(UserWarning, match="'same' is the base itself"):
        merge_experts({"near": experts["near"], "same": base}, **options)


def test_a_bar_names_every_parameter_and_the_memory():
    base = make("mlp")[0]
    seen = []

    def progress(items, total, description, note=None):
        for item in items:
            seen.append((description, total, note(item) if note else None))
            yield item

    runtime = Runtime(progress=progress)
    merge_experts(
        experts_of(base, "net.9"), base=base, head="net.9", correction=None, runtime=runtime
    )
    for description in ("Measuring", "Merging"):
        notes = [note for found, _, note in seen if found == description]
        assert len(notes) == 10
        assert re.fullmatch(r"net\.0\.weight, \d+\.\d\d GiB", notes[0])
    assert memory_in_use() > 2**20


class Scaled(nn.Module):
    """Divides by a running deviation, which no name gives away as a statistic."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.register_buffer("deviation", torch.ones(6))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.fc(x) / self.deviation)


def scaled_experts():
    base = Scaled()
    experts = {task: tuned(base, seed) for seed, task in enumerate("ab")}
    for value, expert in zip((0.3, 0.6), experts.values(), strict=True):
        expert.deviation.fill_(value)
    return base, experts


@pytest.mark.parametrize(
    "method",
    [
        TaskArithmetic(scale=2.0),
        TSVMerge(scale=3.0),
        OutputProjection(fallback=TaskArithmetic(scale=2.0)),
    ],
    ids=lambda method: type(method).__name__,
)
def test_floating_buffers_of_any_name_are_averaged(method, tmp_path):
    base, experts = scaled_experts()
    inputs = {task: torch.randn(20, 4) for task in experts}
    pool = ExpertPool.create(tmp_path / "pool", base, "head")
    for task, expert in experts.items():
        pool.add(task, expert, calibration=inputs[task])
    for source, rest in ((experts, {"base": base, "head": "head"}), (pool, {"module": base})):
        model = merge_experts(source, method, inputs, **rest)
        torch.testing.assert_close(model.network.deviation, torch.full((6,), 0.45))
        if isinstance(method, TaskArithmetic):
            assert model.report["fallback"]["average"]["names"] == ["deviation"]
            assert model.record["method"]["init_args"]["buffers"] == ()
