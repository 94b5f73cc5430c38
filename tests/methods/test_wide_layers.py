"""Layers too wide for second moments of their inputs, against the same layers with these."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_merge.layers import coordinates
from lightning_merge.layers.coordinates import by_row, outputs
from lightning_merge.methods import (
    TIES,
    Average,
    OutputProjection,
    TaskArithmetic,
)
from lightning_merge.networks import split_state
from tests.layers.networks import (
    Convolutions,
    Tokens,
    calibration_of,
    experts_of,
    mlp,
)

PREFERENCE = {"task0": 0.5, "task1": 0.2, "task2": 0.3}
HEURISTICS = (TIES(density=0.6), TaskArithmetic(scale=0.4))
NETWORKS = {
    "linear": (lambda: mlp(6, 12), "4", (12,)),
    "grouped convolution": (Convolutions, "head", (2, 7, 6)),
}


def double_case(network, head, shape, tasks=3, samples=30):
    """A case in float64, where both routes can agree to rounding."""
    torch.manual_seed(1)
    network = network().double().eval()
    experts = experts_of(network, tasks)
    inputs = {
        task: torch.randn(samples + 3 * t, *shape, dtype=torch.float64) + 0.3 * t
        for t, task in enumerate(experts)
    }
    states = {task: split_state(expert, head)[0] for task, expert in experts.items()}
    return split_state(network, head)[0], states, calibration_of(experts, inputs, head)


def project(method, given, statistics=None):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*do not determine all")
        if statistics is None:
            return method.project(*given)
        return method.solve(*given, statistics)


def assert_same(one, other):
    (merged, reports), (expected, references) = one, other
    for name, value in expected.items():
        scale = float(value.abs().max()) if value.numel() else 1.0
        torch.testing.assert_close(merged[name], value, rtol=1e-10, atol=1e-10 * scale)
    for ours, theirs in zip(reports, references, strict=True):
        assert (ours.name, ours.kept, ours.rank, ours.ridge) == (
            theirs.name,
            theirs.kept,
            theirs.rank,
            theirs.ridge,
        )
        assert ours.captured == pytest.approx(theirs.captured, rel=1e-9, abs=1e-10, nan_ok=True)
        assert ours.held_out == pytest.approx(theirs.held_out, rel=1e-9, abs=1e-10, nan_ok=True)
        assert ours.heuristics == pytest.approx(theirs.heuristics, rel=1e-9, abs=1e-10)
        # Elements may be nearly collinear, with a ridge of 1e-6 alone to tell them apart.
        assert ours.coefficients == pytest.approx(theirs.coefficients, rel=1e-7, abs=1e-8)


BASES = {
    "task": dict(basis="task"),
    "row": dict(basis="row", preference=None),
    "block": dict(basis="block", num_blocks=3, task_scale="per_sample"),
    "span": dict(basis="span", fallback=TaskArithmetic(scale=0.3)),
    "task_global": dict(basis="task_global"),
    "no folds": dict(basis="row", num_folds=None, heuristics=()),
    "automatic ridge": dict(basis="row", ridge="auto"),
}
CONSTRAINTS = {
    "bounds": dict(lower=0.1, upper=0.35),
    "sum": dict(total=1.0),
    "simplex": dict(lower=0.0, total=1.0),
    "non-negative": dict(lower=0.0),
}


def assert_routes_agree(kind, **options):
    network, head, shape = NETWORKS[kind]
    given = double_case(network, head, shape)
    method = OutputProjection(**dict(heuristics=HEURISTICS, preference=PREFERENCE) | options)
    narrow = project(method, given)
    assert_same(project(replace(method, max_inputs=7), given), narrow)
    return narrow


SEQUENTIAL = {"mode": "sequential", "targets": "expert_output"}
SAME = {"mode": "sequential", "targets": "same_input"}
PARALLEL = {"mode": "parallel"}
RUNS = [("linear", name, PARALLEL) for name in BASES]
RUNS += [("linear", name, SEQUENTIAL) for name in ("task", "row", "span", "automatic ridge")]
RUNS += [("linear", "block", SAME)]
RUNS += [("grouped convolution", name, SEQUENTIAL) for name in ("task", "block")]
RUNS += [("grouped convolution", "task_global", PARALLEL), ("grouped convolution", "row", SAME)]


@pytest.mark.parametrize(("kind", "options", "mode"), RUNS)
def test_outputs_of_given_updates_say_what_second_moments_say(kind, options, mode):
    assert_routes_agree(kind, **mode, **BASES[options])


@pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=list(CONSTRAINTS))
def test_constrained_coefficients_are_the_same(constraint):
    reports = assert_routes_agree(
        "linear", basis="block", mode="parallel", safeguard=False, heuristics=(), **constraint
    )[1]
    assert all(report.kept == "solution" for report in reports)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_attentions_go_both_ways(mode):
    torch.manual_seed(2)
    network = Tokens().double().eval()
    experts = experts_of(network, 2)
    inputs = {t: {"input_ids": torch.randint(0, 9, (20, 7))} for t in experts}
    states = {task: split_state(expert, "head")[0] for task, expert in experts.items()}
    base = split_state(network, "head")[0]
    given = (base, states, calibration_of(experts, inputs, "head"))
    method = OutputProjection(basis="row", mode=mode, tokens_per_sample=4)
    assert_same(project(replace(method, max_inputs=8), given), project(method, given))


def test_no_tensor_of_inputs_by_inputs_is_kept():
    given = double_case(*NETWORKS["linear"])
    method = OutputProjection(basis="row", heuristics=HEURISTICS, max_inputs=7)
    sums = method.statistics(*given)
    for one in sums["0"]:
        # The base, three task vectors and two heuristics; the average is made of the vectors.
        assert len(one.elements) == 6
        assert {n: tuple(v.shape) for n, v in one.tensors().items()} == {
            "n": (5,),
            "gram": (5, 6, 6, 6),
        }
    assert sums["2"][0].tensors()["gram"].shape == (5, 1, 7, 7)


def test_columns_in_many_pieces_are_summed_alike(monkeypatch):
    given = double_case(*NETWORKS["grouped convolution"])
    method = OutputProjection(basis="row", max_inputs=7)
    whole = project(method, given)
    monkeypatch.setattr(coordinates, "WORKSPACE", 1000)
    assert_same(project(method, given), whole)


def test_a_change_of_coordinates_is_exact():
    generator = torch.Generator().manual_seed(3)
    matrices = torch.randn(4, 2, 3, 5, generator=generator, dtype=torch.float64)
    columns = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    values = outputs(matrices, columns).numpy()
    for e in range(4):
        for g in range(2):
            expected = columns[g].numpy() @ matrices[e, g].numpy().T
            for o in range(3):
                np.testing.assert_allclose(values[3 * g + o, :, e], expected[:, o], atol=1e-12)
                rows = by_row(torch.tensor(expected).expand(2, -1, -1)).numpy()
                np.testing.assert_array_equal(rows[3 * g + o, :, 0], expected[:, o])


def test_another_preference_is_solved_from_the_same_statistics():
    given = double_case(*NETWORKS["linear"])
    method = OutputProjection(basis="row", mode="parallel", heuristics=HEURISTICS, max_inputs=7)
    statistics = method.statistics(*given)
    for other in (
        replace(method, preference={"task0": 0.9, "task2": 0.1}),
        replace(method, basis="task", heuristics=HEURISTICS[1:]),
        replace(method, basis="task", heuristics=(Average(),), max_inputs=8192),
    ):
        assert_same(project(other, given, statistics), project(other, given))


def test_statistics_that_say_nothing_of_a_heuristic_or_a_layer_are_refused():
    given = double_case(*NETWORKS["linear"])
    method = OutputProjection(basis="row", mode="parallel", max_inputs=7)
    statistics = method.statistics(*given)
    with pytest.raises(ValueError, match=r"layer '0'.*hold no outputs of TIES.*the task vector of"):
        replace(method, heuristics=(TIES(),)).solve(*given, statistics)
    with pytest.warns(UserWarning, match="max_inputs=7"):
        statistics = replace(method, basis="full").statistics(*given)
    with pytest.raises(ValueError, match=r"lack 1 layers, such as 0: collect them"):
        method.solve(*given, statistics)


@pytest.mark.parametrize("basis", ["full", "subspace", "rotated_row"])
def test_bases_beyond_given_updates_leave_wide_layers_to_the_fallback(basis):
    base, states, calibration = double_case(*NETWORKS["linear"])
    method = OutputProjection(basis=basis, max_inputs=7, directions="reachable")
    with pytest.warns(UserWarning, match=r"1 layers have more than max_inputs=7 .*Average: 0\."):
        merged = method.merge(base, states, calibration)
    assert torch.equal(merged["0.weight"], Average().merge(base, states)["0.weight"])


def test_wide_layers_without_a_change_keep_the_base_even_where_inputs_drift():
    base, states, calibration = double_case(*NETWORKS["linear"])
    for state in states.values():
        state["2.weight"], state["2.bias"] = base["2.weight"].clone(), base["2.bias"].clone()

    def expert(task):
        found = calibration.network(task)
        found.load_state_dict(states[task], strict=False)
        return found

    method = OutputProjection(basis="row", max_inputs=6)
    merged, reports = method.project(base, states, replace(calibration, network=expert))
    assert torch.equal(merged["2.weight"], base["2.weight"])
    assert [report.kept == "base" for report in reports] == [False, True]
