"""Fisher against sample-by-sample autograd and the definition written out."""

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_merge.calibration import CalibrationInputs
from lightning_merge.functional.fisher import fisher_terms
from lightning_merge.methods import Average, Fisher
from lightning_merge.networks import logits_of
from tests.methods.calibrated import Lockstep, setting
from tests.networks import KINDS


def reference(calibration, task, names, rows):
    """Loop over samples and classes, one backward pass each, in float64."""
    network = calibration.network(task)
    live = dict(network.named_parameters())
    total = {name: torch.zeros(live[name].shape, dtype=torch.float64) for name in names}
    for row in rows:
        sample = calibration.inputs[task][slice(row, row + 1)]
        scores = logits_of(network(sample)).log_softmax(1)[0]
        for score in scores:
            network.zero_grad()
            score.backward(retain_graph=True)
            for name in names:
                total[name] += score.exp().item() * live[name].grad.double().square()
    return {name: value / len(rows) for name, value in total.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_information_is_that_of_a_loop(kind):
    base, _, calibration = setting(kind, samples=5)
    method = Fisher(samples=5, samples_at_once=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all of these run in vmap
        found = method.information("task1", calibration)
    expected = reference(calibration, "task1", list(found), range(5))
    assert set(found) <= set(base)
    for name, value in expected.items():
        scale = float(value.max()) + 1e-12
        torch.testing.assert_close(found[name] / scale, value / scale, atol=1e-5, rtol=1e-4)


def test_squares_are_not_those_of_batch_means():
    _, _, calibration = setting(samples=8)
    found = Fisher(samples=8, samples_at_once=8).information("task0", calibration)
    one = Fisher(samples=8, samples_at_once=1).information("task0", calibration)
    for name, value in found.items():
        torch.testing.assert_close(value, one[name], rtol=1e-4, atol=1e-9)


class Stubborn(nn.Module):
    """Control flow that depends on values: not for vmap."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x * 2 if float(x.sum()) > 0 else x)


def test_networks_that_vmap_cannot_run_go_sample_by_sample():
    _, _, calibration = setting(samples=4)
    stubborn = replace(
        calibration, network=lambda task: Stubborn(calibration.network(task)), head="inner.net.9"
    )
    with pytest.warns(UserWarning, match="Stubborn cannot run in torch.func.vmap"):
        found = Fisher(samples=4).information("task0", stubborn)
    expected = reference(stubborn, "task0", list(found), range(4))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-9)


def test_the_merge_is_the_weighted_average():
    base, experts, calibration = setting("resnet", samples=6)
    weights = {"task0": 2.0, "task1": 0.0, "task2": 0.5}
    method = Fisher(samples=6, weights=weights, epsilon=1e-3)
    merged = method.merge(base, experts, calibration)
    informed = {task: method.information(task, calibration) for task in experts}
    names = list(informed["task0"])
    norms = {t: torch.cat([v.flatten() for v in f.values()]).norm() for t, f in informed.items()}
    for name in names:
        shares = {t: weights[t] * (informed[t][name] / norms[t] + 1e-3) for t in experts}
        mean = sum(shares[t] * experts[t][name].double() for t in experts) / sum(shares.values())
        torch.testing.assert_close(merged[name], mean.float())
        stacked = torch.stack([experts[t][name] for t in ("task0", "task2")])
        assert bool((merged[name] >= stacked.amin(0)).all())
        assert bool((merged[name] <= stacked.amax(0)).all())
    averaged = Average(weights=weights).merge(base, experts)
    for name in set(base) - set(names):  # buffers
        torch.testing.assert_close(merged[name], averaged[name])
        assert merged[name].dtype == base[name].dtype


def test_one_expert_and_identical_experts_come_back():
    base, experts, calibration = setting(classes=(3,))
    merged = Fisher(samples=4).merge(base, experts, calibration)
    assert all(torch.equal(merged[name], experts["task0"][name]) for name in base)
    base, experts, calibration = setting()
    alike = dict.fromkeys(experts, experts["task0"])
    merged = Fisher(samples=4).merge(base, alike, calibration)
    for name in base:
        torch.testing.assert_close(merged[name], alike["task0"][name])


def test_permuted_experts_give_the_same():
    base, experts, calibration = setting()
    one = Fisher(samples=4).merge(base, experts, calibration)
    two = Fisher(samples=4).merge(base, dict(reversed(experts.items())), calibration)
    for name in base:
        torch.testing.assert_close(one[name], two[name])


def test_ties_and_integers_are_kept():
    base, experts, calibration = setting("tied")
    merged = Fisher(samples=4).merge(base, experts, calibration)
    assert list(merged) == list(base)
    assert merged["first.weight"] is merged["second.weight"]
    assert merged["steps"].item() == 7


def test_drawn_labels_approach_the_exact_information():
    _, _, calibration = setting(samples=6)
    exact = Fisher(samples=6).information("task1", calibration)
    drawn = Fisher(samples=6, exact_classes=2, draws=64).information("task1", calibration)
    again = Fisher(samples=6, exact_classes=2, draws=64, samples_at_once=1)
    for name, value in exact.items():
        error = (drawn[name] - value).norm() / value.norm()
        assert float(error) < 0.5, name
        assert not torch.equal(drawn[name], value)
    for name, value in again.information("task1", calibration).items():  # the same labels
        torch.testing.assert_close(value, drawn[name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("exact_classes", [32, 1])
def test_two_processes_give_the_result_of_one(exact_classes):
    method = Fisher(samples=7, samples_at_once=2, exact_classes=exact_classes)
    base, experts, calibration = setting(samples=9)
    alone = method.merge(base, experts, calibration)
    found = Lockstep().run(
        lambda runtime: method.merge(base, experts, replace(calibration, runtime=runtime))
    )
    for name in base:
        torch.testing.assert_close(found[0][name], alone[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(found[0][name], found[1][name])


def test_nothing_given_is_changed():
    base, experts, calibration = setting("resnet", samples=4)
    before = {n: v.clone() for n, v in base.items()}
    kept = {t: {n: v.clone() for n, v in e.items()} for t, e in experts.items()}
    merged = Fisher(samples=4).merge(base, experts, calibration)
    for name in base:
        assert torch.equal(base[name], before[name])
        assert merged[name].data_ptr() != base[name].data_ptr()
        assert all(torch.equal(experts[t][name], kept[t][name]) for t in experts)


@given(st.integers(0, 1000), st.integers(1, 4))
def test_quotient_is_in_the_hull_and_moves_to_what_counts(seed, num_experts):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randn(num_experts, 7, generator=generator, dtype=torch.float64)
    fisher = torch.rand_like(experts).square()

    def mean(information):
        terms = [fisher_terms(e, f, 1.0, 1e-6) for e, f in zip(experts, information, strict=True)]
        return sum(t[0] for t in terms) / sum(t[1] for t in terms)

    merged = mean(fisher)
    assert bool((merged <= experts.amax(0) + 1e-12).all())
    assert bool((merged >= experts.amin(0) - 1e-12).all())
    doubled = fisher.clone()
    doubled[0] *= 2
    closer = (mean(doubled) - experts[0]).abs() <= (merged - experts[0]).abs() + 1e-12
    assert bool(closer.all())
    same = mean(torch.ones_like(fisher))
    torch.testing.assert_close(same, experts.mean(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, found 0"),
        ({"epsilon": 0.0}, "epsilon must be a positive number, found 0.0"),
        ({"weights": {"a": -1.0}}, "none negative"),
        ({"weights": {"a": 0.0}}, "not all zero"),
    ],
)
def test_bad_hyper_parameters(arguments, message):
    with pytest.raises(ValueError, match=message):
        Fisher(**arguments)


def test_bad_inputs():
    base, experts, calibration = setting(samples=4)
    with pytest.raises(ValueError, match="weights must name every expert once: task0, task1"):
        Fisher(weights={"task0": 1.0}).merge(base, experts, calibration)
    without = replace(calibration, inputs={"task0": calibration.inputs["task0"]})
    with pytest.raises(ValueError, match="no calibration inputs for task1, task2, which Fisher"):
        Fisher().merge(base, experts, without)
    with pytest.raises(ValueError, match="no experts"):
        Fisher().merge(base, {}, calibration)
    with pytest.raises(ValueError, match=r"holds 1 tensors of the head 'net.9' \(net.9.weight\)"):
        whole = {"net.9.weight": torch.ones(3, 8)}
        Fisher().merge(
            {**base, **whole}, {t: {**e, **whole} for t, e in experts.items()}, calibration
        )
    broken = {t: dict(e) for t, e in experts.items()}
    broken["task1"]["net.0.bias"] = torch.full((8,), float("nan"))
    with pytest.raises(ValueError, match="'task1': parameter 'net.0.bias' holds 8 non-finite"):
        Fisher(samples=2).merge(base, broken, calibration)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_input_that_is_not_finite_is_named(value):
    base, experts, calibration = setting(samples=6)
    tensor = calibration.inputs["task1"].tensors()["inputs"].clone()
    tensor[4, 2] = value
    calibration = replace(
        calibration, inputs={**calibration.inputs, "task1": CalibrationInputs.collect(tensor)}
    )
    with pytest.raises(ValueError, match=r"'task1': .*'inputs' holds NaN .* first in sample 4\. "):
        Fisher(samples=6).merge(base, experts, calibration)


class Overflowing(nn.Module):
    """Finite inputs, gradients that are not."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 1e38 * 1e38


@pytest.mark.filterwarnings("ignore:.*cannot run in torch.func.vmap")
def test_information_that_overflows_names_the_task():
    _, _, calibration = setting(samples=4)
    broken = replace(
        calibration, network=lambda task: Overflowing(calibration.network(task)), head="inner.net.9"
    )
    with pytest.raises(ValueError, match="'task0': the Fisher information of 10 parameters holds"):
        Fisher(samples=4).information("task0", broken)
