"""GreedySoup against the recipe written out in NumPy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_merge import merge_experts
from lightning_merge.calibration import CalibrationInputs
from lightning_merge.methods import GreedySoup
from lightning_merge.networks import load_backbone, logits_of
from tests.methods.calibrated import Lockstep, setting
from tests.methods.models import flat, model_sets, models
from tests.networks import make, tuned


def recipe(experts, score):
    """Recipe 1 of the paper, on flat vectors."""
    vectors = {task: flat(expert) for task, expert in experts.items()}
    scores = {task: score(vector) for task, vector in vectors.items()}
    order = sorted(vectors, key=lambda task: -scores[task])
    members, best = [order[0]], scores[order[0]]
    for task in order[1:]:
        found = score(np.mean([vectors[t] for t in (*members, task)], axis=0))
        if found >= best:
            members, best = [*members, task], found
    return members, np.mean([vectors[t] for t in members], axis=0), best, max(scores.values())


@given(model_sets(), st.integers(0, 100))
def test_is_the_recipe_under_any_score(sets, seed):
    base, experts = sets
    target = np.random.default_rng(seed).normal(size=len(flat(base)))

    def score(vector):
        return -float(np.round(np.abs(np.asarray(vector, np.float32) - target).sum(), 3))

    members, mean, best, best_single = recipe(experts, score)
    soup = GreedySoup().soup(base, experts, lambda state: score(flat(state)))
    assert soup.members == members
    np.testing.assert_allclose(flat(soup.state), mean, rtol=1e-6, atol=1e-6)
    assert soup.score == pytest.approx(best, abs=2e-3)
    assert soup.score >= max(soup.scores.values()) == pytest.approx(best_single)
    assert [task for task, _, added in soup.trace if added] == members
    assert len(soup.trace) == len(experts)


def test_equal_scores_keep_the_order_and_take_all():
    base, experts = models(3)
    soup = GreedySoup().soup(base, experts, lambda state: 1.0)
    assert soup.members == list(experts)
    np.testing.assert_allclose(
        flat(soup.state), np.mean([flat(e) for e in experts.values()], 0), rtol=1e-6
    )


def test_identical_experts_and_one_expert_come_back():
    base, experts = models(1)
    for tasks in (["a"], ["a", "b", "c"]):
        soup = GreedySoup().soup(base, dict.fromkeys(tasks, experts["task0"]), lambda state: 0.5)
        assert all(torch.equal(soup.state[n], experts["task0"][n]) for n in base)


def by_hand(calibration, experts, state):
    shares = []
    for task in experts:
        expert, merged = calibration.network(task), calibration.network(task)
        load_backbone(merged, state, calibration.head)
        x = calibration.inputs[task][slice(None)]
        with torch.no_grad():
            same = logits_of(merged(x)).argmax(1) == logits_of(expert(x)).argmax(1)
        shares.append(float(same.double().mean()))
    return float(np.mean(shares))


@pytest.mark.parametrize("kind", ["mlp", "tied", "mapping", "vit"])
def test_the_score_is_agreement_with_the_experts(kind):
    _, experts, calibration = setting(kind, samples=21)
    score = GreedySoup().score(list(experts), calibration)
    for task in experts:
        assert score(experts[task]) == pytest.approx(by_hand(calibration, experts, experts[task]))
    base, experts, calibration = setting(classes=(3,))
    assert GreedySoup().score(["task0"], calibration)(experts["task0"]) == 1.0
    assert GreedySoup(samples=5).score(["task0"], calibration)(base) in (0, 0.2, 0.4, 0.6, 0.8, 1)


def test_batch_norms_are_estimated_anew():
    base, experts, calibration = setting("resnet", samples=16)
    score = GreedySoup().score(list(experts), calibration)
    spoiled = {
        n: v + 100.0 if n.endswith("running_mean") else v for n, v in experts["task0"].items()
    }
    assert score(spoiled) == score(experts["task0"])
    merged = GreedySoup().merge(base, experts, calibration)
    assert all(bool((v >= 0).all()) for n, v in merged.items() if n.endswith("running_var"))


def test_through_merge_experts():
    base, head, shape = make("vit")
    experts = {f"t{i}": tuned(base, i) for i in range(3)}
    inputs = {task: torch.randn(12, *shape) for task in experts}
    model = merge_experts(experts, GreedySoup(), inputs, base=base, head=head)
    assert model.record["method"]["class_path"].endswith("GreedySoup")


def test_two_processes_give_the_result_of_one():
    base, experts, calibration = setting("tied", samples=19)
    alone = GreedySoup().merge(base, experts, calibration)
    found = Lockstep().run(
        lambda runtime: GreedySoup().merge(base, experts, replace(calibration, runtime=runtime))
    )
    for state in found:
        assert all(torch.equal(state[name], alone[name]) for name in base)
    assert alone["first.weight"] is alone["second.weight"]


def test_bad_input():
    base, experts, calibration = setting()
    with pytest.raises(ValueError, match="samples must be at least 1, found 0"):
        GreedySoup(samples=0)
    with pytest.raises(ValueError, match="the score of task0 is NaN"):
        GreedySoup().soup(base, experts, lambda state: float("nan"))
    with pytest.raises(ValueError, match="no calibration inputs for task0"):
        GreedySoup().merge(base, experts, replace(calibration, inputs={}))
    with pytest.raises(ValueError, match="no experts"):
        GreedySoup().merge(base, {}, calibration)
    broken = {t: dict(e) for t, e in experts.items()}
    broken["task1"]["net.0.bias"] = torch.full((8,), float("inf"))
    with pytest.raises(ValueError, match="expert 'task1': parameter 'net.0.bias' holds 8"):
        GreedySoup().merge(base, broken, calibration)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_is_named(value):
    base, experts, calibration = setting(samples=10)
    tensor = calibration.inputs["task2"].tensors()["inputs"].clone()
    tensor[9, 0] = value
    calibration = replace(
        calibration, inputs={**calibration.inputs, "task2": CalibrationInputs.collect(tensor)}
    )
    with pytest.raises(ValueError, match=r"'task2': .*'inputs' holds NaN .* first in sample 9\. "):
        GreedySoup().merge(base, experts, calibration)


def overflowing(network, state):
    """The same network with a backbone that finite inputs overflow in."""
    load_backbone(network, {name: value * 1e38 for name, value in state.items()}, "net.9")
    return network


@pytest.mark.parametrize("size", [1, 2])
def test_scores_of_an_expert_that_are_not_finite_are_told_on_every_process(size):
    _, experts, _ = setting(samples=20)

    def run(runtime):
        calibration = setting(samples=20, runtime=runtime)[2]
        network = calibration.network
        broken = replace(
            calibration,
            network=lambda task: (
                overflowing(network(task), experts[task]) if task == "task1" else network(task)
            ),
        )
        try:
            GreedySoup().score(list(experts), broken)
        except ValueError as error:
            return str(error)

    messages = Lockstep(size).run(run)
    assert set(messages) == {messages[0]}
    assert messages[0].startswith("'task1': the class scores of its expert hold NaN or infinity in")


def test_scores_of_a_soup_that_are_not_finite_are_told():
    _, experts, calibration = setting(samples=10)
    score = GreedySoup().score(list(experts), calibration)
    broken = {name: value * 1e38 for name, value in experts["task0"].items()}
    with pytest.raises(ValueError, match="'task0': the class scores of a soup hold NaN"):
        score(broken)
