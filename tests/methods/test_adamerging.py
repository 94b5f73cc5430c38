"""AdaMerging: gradients against autograd through the merge, and every invariant of the method."""

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_merge.calibration import CalibrationInputs
from lightning_merge.functional.adamerging import divergence, entropy, group_of, projected
from lightning_merge.methods import TIES, AdaMerging, Calibration, TaskArithmetic, TSVMerge
from lightning_merge.methods.adaptation.learner import Learner
from lightning_merge.methods.adaptation.sampling import rows_of
from lightning_merge.methods.ties import agreeing_task_vectors
from lightning_merge.networks import logits_of, split_state
from tests.methods.calibrated import Lockstep, setting
from tests.networks import tuned

GRANULARITIES = ("task", "block", "tensor")
SMALL = dict(steps=4, batch_size=4, lr=0.02, patience=None)


def learner_of(method, base, experts, calibration):
    weights, shared, parts = method._prepare(base, experts, calibration)
    groups = tuple({group_of(n, method.granularity): None for n in parts.parameters})
    return Learner(method, calibration, shared, weights, groups, ""), groups


def through_the_merge(method, base, experts, calibration, coefficients, groups, step=0):
    """Loss and gradient by autograd through the merge, one forward pass a task, in float64."""
    leaf = coefficients.clone().requires_grad_()
    total = 0.0
    for task in experts:
        network = calibration.network(task).double()
        live = dict(network.named_parameters(remove_duplicate=False))
        merged = {}
        for name in base:
            if name in live:
                row = leaf[groups.index(group_of(name, method.granularity))]
                vectors = [e[name].double() - base[name].double() for e in experts.values()]
                merged[name] = base[name].double() + sum(
                    c * v for c, v in zip(row, vectors, strict=True)
                )
        rows = rows_of(method.seed, task, step, len(calibration.inputs[task]), method.batch_size)
        x = calibration.inputs[task].take(rows).double()
        logits = logits_of(functional_call(network, merged, (x,)))
        p = logits.softmax(1)
        each = -(p * p.log()).sum(1)
        if method.loss != "entropy":
            theirs = logits_of(calibration.network(task).double()(x)).softmax(1)
            kl = (theirs * (theirs / p).log()).sum(1)
            each = kl if method.loss == "expert_kl" else each + kl
        scale = 1 / np.log(logits.shape[1]) if method.normalize else 1.0
        total = total + scale * each.mean()
    (gradient,) = torch.autograd.grad(total, leaf)
    return float(total.detach()), gradient


def in_double(base, experts, calibration):
    """The same in float64, so that nothing but a wrong formula makes a difference."""

    def wide(state):
        return {n: v.double() if v.is_floating_point() else v for n, v in state.items()}

    inputs = {
        t: CalibrationInputs.collect(x[slice(None)].double()) for t, x in calibration.inputs.items()
    }
    wider = replace(calibration, network=lambda t: calibration.network(t).double(), inputs=inputs)
    return wide(base), {t: wide(e) for t, e in experts.items()}, wider


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_images_per_forward": 3, "loss": "both"},
        {"storage": "stream", "loss": "expert_kl", "normalize": True},
    ],
)
@pytest.mark.parametrize(
    ("kind", "granularity"),
    [
        *((kind, granularity) for kind in ("mlp", "vit") for granularity in GRANULARITIES),
        *((kind, "tensor") for kind in ("convnext", "deep_head", "mapping")),
    ],
)
def test_gradient_is_that_through_the_merge(kind, granularity, options):
    base, experts, calibration = in_double(*setting(kind, samples=9))
    method = AdaMerging(granularity=granularity, batch_size=5, **options)
    learner, groups = learner_of(method, base, experts, calibration)
    assert learner.shared.joint == (kind != "mapping")  # halves its scores behind its head
    generator = torch.Generator().manual_seed(3)
    point = 0.3 + 0.2 * torch.randn(len(groups), 3, generator=generator, dtype=torch.float64)
    learner.weights.write(point)
    found = learner.sums(0)
    loss, gradient = through_the_merge(method, base, experts, calibration, point, groups)
    assert float(found.loss.sum()) == pytest.approx(loss, rel=1e-9)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-7, atol=1e-12)


def test_gradient_in_single_precision():
    base, experts, calibration = setting("vit", samples=9)
    method = AdaMerging(batch_size=5, max_images_per_forward=4)
    learner, groups = learner_of(method, base, experts, calibration)
    point = torch.full((len(groups), 3), 0.3, dtype=torch.float64)
    learner.weights.write(point)
    _, gradient = through_the_merge(method, base, experts, calibration, point, groups)
    error = (learner.sums(0).gradient - gradient).norm() / gradient.norm()
    assert float(error) < 1e-5


def test_tied_parameters_count_once():
    base, experts, calibration = setting("tied", samples=9)
    method = AdaMerging(batch_size=5)
    learner, groups = learner_of(method, base, experts, calibration)
    assert "second.weight" not in groups
    assert learner.sums(0).gradient.shape == (len(groups), 3)
    result = AdaMerging(**SMALL).merge(base, experts, calibration)
    assert result["first.weight"] is result["second.weight"]
    assert result["steps"].item() == 7


def write(method, base, experts, calibration, coefficients):
    weights, _, _ = method._prepare(base, experts, calibration)
    weights.write(coefficients)
    return {name: value.detach() for name, value in weights.live.items()}


@pytest.mark.parametrize("storage", ["exact", "stream"])
def test_corners_and_task_arithmetic(storage):
    base, experts, calibration = setting("vit")
    method = AdaMerging(granularity="task", storage=storage)
    corner = torch.zeros(1, 3, dtype=torch.float64)
    for name, value in write(method, base, experts, calibration, corner).items():
        assert torch.equal(value, base[name])
    corner[0, 1] = 1
    for name, value in write(method, base, experts, calibration, corner).items():
        torch.testing.assert_close(value, experts["task1"][name], atol=1e-6, rtol=0)
    uniform = AdaMerging(steps=0).merge(base, experts, calibration)
    expected = TaskArithmetic(scale=0.3).merge(base, experts)
    assert list(uniform) == list(base)
    for name in base:
        torch.testing.assert_close(uniform[name], expected[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("storage", "tolerance"), [("bfloat16", 4e-3), ("float16", 5e-4)])
def test_compact_task_vectors_are_close(storage, tolerance):
    base, experts, calibration = setting("vit")
    huge = {t: {n: v * 1e6 for n, v in e.items()} for t, e in experts.items()}
    for chosen in (experts, huge):  # float16 alone would overflow
        exact = AdaMerging(granularity="task")
        compact = AdaMerging(granularity="task", storage=storage)
        at = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
        ours = write(compact, base, chosen, calibration, at)
        for name, value in write(exact, base, chosen, calibration, at).items():
            size = float((chosen["task0"][name] - base[name]).abs().max())
            assert float((ours[name] - value).abs().max()) <= tolerance * size + 1e-6


def test_joint_forward_is_that_of_each_task_alone():
    base, experts, calibration = setting("vit", samples=9)
    method = AdaMerging(batch_size=5)
    joint, groups = learner_of(method, base, experts, calibration)
    alone, _ = learner_of(method, base, experts, calibration)
    alone.shared.joint = False
    point = torch.full((len(groups), 3), 0.4, dtype=torch.float64)
    found = []
    for learner in (joint, alone):
        learner.weights.write(point)
        found.append(learner.sums(0))
    torch.testing.assert_close(found[0].loss, found[1].loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0].gradient, found[1].gradient, rtol=1e-4, atol=1e-6)


class Mixing(nn.Module):
    """Samples of a batch influence one another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x - x.mean(0))


def test_networks_that_mix_samples_get_one_pass_a_task():
    base, experts, calibration = setting("mlp", samples=9)
    mixing = replace(
        calibration, network=lambda t: Mixing(calibration.network(t)), head="inner.net.9"
    )
    base = {f"inner.{n}": v for n, v in base.items()}
    experts = {t: {f"inner.{n}": v for n, v in e.items()} for t, e in experts.items()}
    method = AdaMerging(batch_size=5, granularity="task")
    learner, groups = learner_of(method, base, experts, mixing)
    assert not learner.shared.joint
    point = torch.full((1, 3), 0.3, dtype=torch.float64)
    learner.weights.write(point)
    loss, gradient = through_the_merge(method, base, experts, mixing, point, groups)
    found = learner.sums(0)
    assert float(found.loss.sum()) == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-4, atol=1e-6)


class Convolution(nn.Module):
    """Takes images of any size."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)).mean((2, 3)))


def test_tasks_of_different_sizes_are_grouped():
    base, experts, calibration = setting_of(Convolution())
    inputs = dict(calibration.inputs)
    inputs["task1"] = type(inputs["task1"]).collect(torch.randn(9, 1, 12, 12))
    calibration = replace(calibration, inputs=inputs)
    method = AdaMerging(batch_size=5)
    learner, groups = learner_of(method, base, experts, calibration)
    assert learner.shared.joint
    point = torch.full((len(groups), 3), 0.3, dtype=torch.float64)
    learner.weights.write(point)
    found = learner.sums(0)
    loss, gradient = through_the_merge(method, base, experts, calibration, point, groups)
    assert float(found.loss.sum()) == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-4, atol=1e-6)


def setting_of(network, samples=9):
    modules = {f"task{t}": tuned(network, t).eval() for t in range(3)}
    inputs = {t: CalibrationInputs.collect(torch.randn(samples, 1, 8, 8)) for t in modules}
    calibration = Calibration(
        network=lambda task: copy.deepcopy(modules[task]), head="head", inputs=inputs
    )
    experts = {task: split_state(module, "head")[0] for task, module in modules.items()}
    return split_state(network, "head")[0], experts, calibration


def test_same_seed_same_bits_and_permuted_tasks_permuted_columns():
    base, experts, calibration = setting()
    one = AdaMerging(**SMALL).learn(base, experts, calibration)
    two = AdaMerging(**SMALL).learn(base, experts, calibration)
    assert torch.equal(one.values, two.values)
    other = AdaMerging(**SMALL, seed=1).learn(base, experts, calibration)
    assert not torch.equal(one.values, other.values)
    turned = AdaMerging(**SMALL).learn(base, dict(reversed(experts.items())), calibration)
    assert turned.tasks == one.tasks[::-1]
    torch.testing.assert_close(turned.values.flip(1), one.values, atol=1e-6, rtol=0)


def test_one_task():
    base, experts, calibration = setting(classes=(3,))
    assert AdaMerging(**SMALL).learn(base, experts, calibration).values.shape[1] == 1


def test_tensor_gradient_sums_to_the_task_gradient():
    base, experts, calibration = setting("vit", samples=9)
    found = []
    for granularity in ("tensor", "block", "task"):
        method = AdaMerging(batch_size=5, granularity=granularity)
        learner, groups = learner_of(method, base, experts, calibration)
        learner.weights.write(torch.full((len(groups), 3), 0.3, dtype=torch.float64))
        found.append(learner.sums(0).gradient.sum(0))
    torch.testing.assert_close(found[0], found[2], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found[1], found[2], rtol=1e-6, atol=1e-8)


def test_a_coefficient_at_its_bound_comes_back():
    base, experts, calibration = setting()
    method = AdaMerging(granularity="task", bounds=(0.0, 0.4), steps=40, batch_size=20, lr=0.05,
                        patience=None)  # fmt: skip
    learned = method.learn(base, experts, calibration)
    assert float(learned.values.min()) >= 0
    assert float(learned.values.max()) <= 0.4
    # begins outside, where a clamp in the forward pass has no gradient for good
    beyond = replace(method, init=0.9, bounds=(0.0, 0.5), loss="expert_kl", steps=60)
    found = beyond.learn(base, experts, calibration)
    start = found.history["coefficients"][0]
    assert start.tolist() == [0.5, 0.5, 0.5]
    assert float((found.values - 0.5).abs().max()) > 0.05
    values = torch.tensor([[-1.0, 0.5, 2.0]])
    assert projected(values, (0.0, 1.0)).tolist() == [[0.0, 0.5, 1.0]]
    assert projected(values, None) is values


def test_entropy_falls():
    base, experts, calibration = setting(samples=16, amount=0.8)
    method = AdaMerging(steps=60, batch_size=16, lr=5e-3, patience=None)
    entropy_of = method.learn(base, experts, calibration).history["entropy"].mean(1)
    assert entropy_of[-6:].mean() < entropy_of[:6].mean()
    linear = AdaMerging(steps=40, batch_size=16, lr=1e-3, granularity="task", patience=None)
    steps = linear.learn(base, experts, calibration).history["entropy"].sum(1)
    assert bool((steps.diff() <= 1e-6).all())


def test_nothing_given_is_changed_and_nothing_is_aliased():
    base, experts, calibration = setting("resnet", samples=8)
    modules = {task: calibration.network(task) for task in experts}
    own = replace(calibration, network=lambda task: modules[task])  # not even copies
    before = {t: {n: v.clone() for n, v in m.state_dict().items()} for t, m in modules.items()}
    kept = {t: {n: v.clone() for n, v in e.items()} for t, e in experts.items()}
    started = {n: v.clone() for n, v in base.items()}
    merged = AdaMerging(**SMALL).merge(base, experts, own)
    for task, module in modules.items():
        assert all(torch.equal(v, before[task][n]) for n, v in module.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in module.parameters())
        assert all(torch.equal(experts[task][n], v) for n, v in kept[task].items())
    for name, value in merged.items():
        assert torch.equal(base[name], started[name])
        assert not value.requires_grad
        assert value.dtype == base[name].dtype
        assert value.data_ptr() != base[name].data_ptr()


@pytest.mark.parametrize("bn", ["shared", "average", "base"])
def test_batch_norm_policies(bn):
    base, experts, calibration = setting("resnet", samples=8)
    method = AdaMerging(**SMALL, bn=bn, bn_every=2)
    learner, _ = learner_of(method, base, experts, calibration)
    name = next(n for n in base if n.endswith("running_mean"))
    live = dict(learner.shared.network.named_buffers())[name]
    average = torch.stack([e[name] for e in experts.values()]).mean(0)
    torch.testing.assert_close(live, base[name] if bn == "base" else average)
    before = live.clone()
    learner.learn()
    assert torch.equal(live, before) == (bn != "shared")
    assert not any(module.training for module in learner.shared.network.modules())


def test_ties_vectors_are_trimmed_and_agree():
    base, experts, calibration = setting("mlp")
    method = AdaMerging(vectors="ties", density=0.3)
    weights, _, parts = method._prepare(base, experts, calibration)
    names = sorted(parts.parameters)
    kept = torch.cat([weights.vectors.block(n, slice(None)) for n in names], 1)
    plain = torch.cat(
        [torch.stack([(e[n] - base[n]).flatten() for e in experts.values()]) for n in names], 1
    )
    total = plain.shape[1]
    trimmed = torch.zeros_like(plain)
    for row, values in zip(trimmed, plain, strict=True):
        largest = values.abs().topk(round(0.3 * total)).indices
        row[largest] = values[largest]
    signs = trimmed.sum(0).sign()
    assert bool((signs != 0).eq((trimmed != 0).any(0)).all())
    assert torch.equal(kept, torch.where(trimmed.sign() == signs, trimmed, 0.0))
    # their mean over agreeing experts is the TIES merge
    number = (kept != 0).sum(0).clamp(min=1)
    merged = TIES(density=0.3).merge(base, experts)
    expected = torch.cat([(merged[n] - base[n]).flatten() for n in names])
    torch.testing.assert_close(kept.sum(0) / number, expected, atol=1e-6, rtol=0)


def test_ties_without_conflict_is_adamerging():
    base, experts, calibration = setting("mlp")
    experts = {
        t: {n: base[n] + (i + 1) * (experts["task0"][n] - base[n]) for n in base}
        for i, t in enumerate(experts)
    }
    one = AdaMerging(**SMALL).merge(base, experts, calibration)
    two = AdaMerging(**SMALL, vectors="ties", density=1.0).merge(base, experts, calibration)
    for name in base:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=1e-5)


def test_cancelled_entries_take_the_sign_of_the_majority():
    base = {"w": torch.zeros(5)}
    rows = {"a": [1.0, 2, 2, 2, 1], "b": [-1.0, 2, 2, 2, 1], "c": [0.0, 0, 0, 0, -5]}
    experts = {t: {"w": torch.tensor(v)} for t, v in rows.items()}
    found = dict(agreeing_task_vectors(TIES(density=1.0), base, experts))["w"]
    assert found[:, 0].tolist() == [1.0, 0.0, 0.0]
    assert found[:, 4].tolist() == [0.0, 0.0, -5.0]


def test_starting_from_another_merge():
    base, experts, calibration = setting("mlp")
    unlearned = AdaMerging(start=TSVMerge(), steps=0).merge(base, experts, calibration)
    expected = TSVMerge().merge(base, experts)
    for name in base:
        torch.testing.assert_close(unlearned[name], expected[name])
    learned = AdaMerging(start=TSVMerge(), **SMALL).merge(base, experts, calibration)
    assert not torch.equal(learned["net.0.weight"], expected["net.0.weight"])


class Sideways(nn.Module):
    """One of its parameters has no part in the answer."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 4)
        self.leftover = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.flatten(1))))


def test_parameters_without_a_gradient_are_named():
    base, experts, calibration = setting_of(Sideways())
    with pytest.warns(UserWarning, match="1 parameters get no gradient .* leftover"):
        kept = AdaMerging(**SMALL).merge(base, experts, calibration)
    expected = TaskArithmetic(scale=0.3).merge(base, experts)
    torch.testing.assert_close(kept["leftover"], expected["leftover"])
    with pytest.warns(UserWarning, match="leftover"):
        zero = AdaMerging(**SMALL, unused="zero").merge(base, experts, calibration)
    assert torch.equal(zero["leftover"], base["leftover"])


@pytest.mark.parametrize("loss", ["entropy", "both"])
def test_two_processes_give_the_result_of_one(loss):
    method = AdaMerging(steps=6, batch_size=5, lr=0.02, loss=loss, bn_every=2)
    base, experts, calibration = setting("resnet", samples=9)
    alone = method.merge(base, experts, calibration)
    found = Lockstep().run(
        lambda runtime: method.merge(base, experts, replace(calibration, runtime=runtime))
    )
    for name in base:
        torch.testing.assert_close(found[0][name], alone[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(found[0][name], found[1][name])


def test_a_share_may_be_empty():
    method = AdaMerging(steps=2, batch_size=1)
    base, experts, calibration = setting(samples=5)
    alone = method.learn(base, experts, calibration)
    found = Lockstep().run(
        lambda runtime: method.learn(base, experts, replace(calibration, runtime=runtime))
    )
    torch.testing.assert_close(found[1].values, alone.values, rtol=1e-9, atol=0)


def test_samples_come_epoch_by_epoch():
    rows = torch.cat([rows_of(0, "a", step, 7, 3) for step in range(7)])
    for epoch in rows.split(7):
        assert sorted(epoch.tolist()) == list(range(7))
    assert rows[:7].tolist() != rows[7:14].tolist()
    assert rows_of(0, "a", 5, 7, 3).tolist() == rows[15:18].tolist()
    assert rows_of(0, "a", 0, 2, 3).shape == (3,)


def test_entropy_and_divergence():
    for classes in (2, 5):
        uniform = entropy(torch.zeros(1, classes))
        assert float(uniform) == pytest.approx(np.log(classes))
    logits = torch.tensor([[100.0, -100.0], [-100.0, 100.0]], requires_grad=True)
    values = entropy(logits)
    assert float(values.detach().abs().max()) == 0.0
    values.sum().backward()
    assert bool(torch.isfinite(logits.grad).all())
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 4, 3, generator=generator)
    p, q = theirs.softmax(1).double(), ours.softmax(1).double()
    torch.testing.assert_close(divergence(ours, theirs), (p * (p / q).log()).sum(1).float())
    assert float(divergence(ours, ours).abs().max()) < 1e-6


def test_groups():
    names = ["cls_token", "patch.weight", "blocks.0.a.weight", "blocks.0.b.bias", "blocks.1.a"]
    assert [group_of(n, "block") for n in names] == [
        "cls_token", "patch", "blocks.0", "blocks.0", "blocks.1",
    ]  # fmt: skip
    assert {group_of(n, "task") for n in names} == {"all"}
    assert [group_of(n, "tensor") for n in names] == names


def test_no_warning_in_an_ordinary_run():
    base, experts, calibration = setting()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaMerging(**SMALL).merge(base, experts, calibration)
