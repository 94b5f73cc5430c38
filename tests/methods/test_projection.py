import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_merge.functional.coefficients import GRID
from lightning_merge.functional.projection import Quadratic
from lightning_merge.methods import (
    DARE,
    TIES,
    Average,
    OutputProjection,
    RegMean,
    TaskArithmetic,
)
from tests.layers.networks import Convolutions, case, mlp, token_case
from tests.methods.test_regmean import layer_inputs

BASES = ["task", "row", "block", "rotated_row", "subspace", "full"]


def design(network, module, calibration, task):
    """Inputs of a linear layer with the constant of its bias, (n, i + 1)."""
    x = layer_inputs(network, module, calibration.inputs[task][slice(None)])
    return np.concatenate([x, np.ones((len(x), 1))], 1)


def matrix(state, module):
    weight, bias = state[f"{module}.weight"], state[f"{module}.bias"]
    return np.concatenate([weight.double().numpy(), bias.double().numpy()[:, None]], 1)


def losses(module, base, states, experts, calibration, merged):
    """Error of a layer on the experts' inputs, relative to the residual energy, by task."""
    found = {}
    for task, expert in experts.items():
        x = design(expert, module, calibration, task)
        residual = x @ (matrix(states[task], module) - matrix(base, module)).T
        error = x @ (matrix(merged, module) - matrix(states[task], module)).T
        found[task] = (error**2).sum() / (residual**2).sum()
    return found


def test_parallel_task_coefficients_are_least_squares_on_stacked_outputs():
    base, states, calibration, experts = case(mlp(), "4", (4,))
    method = OutputProjection(basis="task", mode="parallel", ridge=0.0, safeguard=False)
    merged, reports = method.project(base, states, calibration)
    for module, report in zip(("0", "2"), reports, strict=True):
        deltas = [matrix(state, module) - matrix(base, module) for state in states.values()]
        columns, targets = [], []
        for (task, expert), delta in zip(experts.items(), deltas, strict=True):
            x = design(expert, module, calibration, task)
            scale = 1 / np.linalg.norm(x @ delta.T)
            columns.append(np.stack([(scale * x @ d.T).ravel() for d in deltas], 1))
            targets.append((scale * x @ delta.T).ravel())
        A, b = np.concatenate(columns), np.concatenate(targets)
        alpha, residual, *_ = np.linalg.lstsq(A, b, rcond=None)
        np.testing.assert_allclose(report.coefficients, alpha, atol=1e-5)
        assert report.captured == pytest.approx(1 - residual[0] / (b @ b), abs=1e-6)
        expected = matrix(base, module) + np.tensordot(alpha, deltas, 1)
        np.testing.assert_allclose(matrix(merged, module), expected, atol=1e-5)


def test_full_and_same_input_is_regmean():
    base, states, calibration, _ = case(mlp(), "4", (4,))
    regmean = RegMean(off_diagonal=1.0, ridge=1e-3)
    for inputs, mode in (("expert", "parallel"), ("merged", "sequential")):
        ours = OutputProjection(
            basis="full",
            mode=mode,
            targets="same_input",
            task_scale="per_sample",
            ridge=1e-3,
            safeguard=False,
        )
        # RegMean has no column of ones: compare on layers whose biases do not differ.
        plain = {
            task: {n: base[n] if n.endswith("bias") else v for n, v in state.items()}
            for task, state in states.items()
        }
        zeros = {n: v if n.endswith("weight") else torch.zeros_like(v) for n, v in base.items()}
        plain = {
            t: {n: zeros[n] if n.endswith("bias") else v for n, v in s.items()}
            for t, s in plain.items()
        }
        network = calibration.network("task0")
        for linear in (network[0], network[2]):
            linear.bias = None
        nets = {}
        for task, state in plain.items():
            nets[task] = copy.deepcopy(network)
            nets[task].load_state_dict(
                {n: v for n, v in state.items() if n.endswith("weight")}, strict=False
            )
        unbiased = replace(calibration, network=lambda task, nets=nets: copy.deepcopy(nets[task]))
        weights_only = {n: v for n, v in base.items() if n.endswith("weight")}
        states_only = {
            t: {n: v for n, v in s.items() if n.endswith("weight")} for t, s in plain.items()
        }
        one = replace(regmean, inputs=inputs).merge(weights_only, states_only, unbiased)
        two = ours.merge(weights_only, states_only, unbiased)
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize("basis", BASES)
def test_identical_experts_give_the_expert(mode, basis):
    base, states, calibration, experts = case(mlp(), "4", (4,), tasks=2)
    same = dict.fromkeys(states, states["task1"])
    calibration = replace(calibration, network=lambda _: copy.deepcopy(experts["task1"]))
    method = OutputProjection(basis=basis, mode=mode, rank=5, directions="reachable")
    with pytest.warns() if basis == "task" else _quiet():
        merged = method.merge(base, same, calibration)
    for name, value in states["task1"].items():
        torch.testing.assert_close(merged[name], value, atol=1e-4, rtol=1e-3)


def _quiet():
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize("basis", ["task", "row", "full"])
def test_a_one_hot_preference_gives_that_experts_outputs(basis):
    base, states, calibration, experts = case(mlp(), "4", (4,))
    method = OutputProjection(
        basis=basis, mode="parallel", ridge=0.0, preference={"task1": 1.0}, safeguard=False
    )
    merged = method.merge(base, states, calibration)
    for module in ("0", "2"):
        found = losses(module, base, states, experts, calibration, merged)
        assert found["task1"] < 1e-8


def test_the_objective_falls_with_the_basis_and_is_below_every_included_heuristic():
    base, states, calibration, experts = case(mlp(8, 6), "4", (6,), samples=15)
    heuristics = (TIES(density=0.5), DARE(density=0.5), TaskArithmetic(scale=0.4))
    previous = {"0": math.inf, "2": math.inf}
    for basis in ("task", "row", "full"):
        method = OutputProjection(
            basis=basis, mode="parallel", heuristics=heuristics, ridge=0.0, safeguard=False
        )
        merged, reports = _unwarned(method, base, states, calibration)
        for module, report in zip(previous, reports, strict=True):
            loss = sum(losses(module, base, states, experts, calibration, merged).values())
            assert report.captured == pytest.approx(1 - loss / 3, abs=1e-5)
            assert loss <= previous[module] + 1e-6
            assert report.captured >= max(report.heuristics.values()) - 1e-6
            previous[module] = loss


def _unwarned(method, base, states, calibration):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return method.project(base, states, calibration)


def test_constraints_are_kept_and_cost_something():
    base, states, calibration, _ = case(mlp(), "4", (4,))
    _, reports = OutputProjection(basis="task", mode="parallel", safeguard=False).project(
        base, states, calibration
    )
    for bounds in (dict(total=1.0), dict(lower=0.0, total=1.0), dict(lower=0.1, upper=0.2)):
        method = OutputProjection(basis="task", mode="parallel", safeguard=False, **bounds)
        _, bounded = method.project(base, states, calibration)
        for one, other in zip(reports, bounded, strict=True):
            alpha = np.array(other.coefficients)
            assert method.constraint.violation(torch.tensor(alpha)[None]) <= 1e-9
            assert other.captured <= one.captured + 1e-9
    rows = OutputProjection(basis="row", mode="parallel", lower=0.0, total=1.0, safeguard=False)
    rows.merge(base, states, calibration)


def test_shared_coefficients_are_those_of_the_summed_systems():
    base, states, calibration, experts = case(mlp(), "4", (4,))
    method = OutputProjection(basis="task_global", mode="parallel", ridge=0.0, safeguard=False)
    merged, reports = method.project(base, states, calibration)
    assert reports[0].coefficients == reports[1].coefficients
    A, b = [], []
    for module in ("0", "2"):
        deltas = [matrix(state, module) - matrix(base, module) for state in states.values()]
        for (task, expert), delta in zip(experts.items(), deltas, strict=True):
            x = design(expert, module, calibration, task)
            scale = 1 / np.linalg.norm(x @ delta.T)
            A.append(np.stack([(scale * x @ d.T).ravel() for d in deltas], 1))
            b.append((scale * x @ delta.T).ravel())
    alpha = np.linalg.lstsq(np.concatenate(A), np.concatenate(b), rcond=None)[0]
    np.testing.assert_allclose(reports[0].coefficients, alpha, atol=1e-5)
    assert merged.keys() == base.keys()


def test_another_preference_is_solved_from_the_same_statistics():
    base, states, calibration, _ = case(mlp(), "4", (4,))
    method = OutputProjection(basis="row", mode="parallel")
    statistics = method.statistics(base, states, calibration)
    other = replace(method, preference={"task0": 0.8, "task2": 0.2})
    merged, _ = other.solve(base, states, calibration, statistics)
    direct = other.merge(base, states, calibration)
    assert all(torch.equal(merged[n], direct[n]) for n in base)


def test_batches_and_their_order_change_nothing():
    results, network = [], mlp()
    for size in (7, 40):
        base, states, calibration, _ = case(network, "4", (4,), batch_size=size)
        results.append(OutputProjection(basis="row").merge(base, states, calibration))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-6, rtol=1e-5)


def test_the_last_layer_corrects_the_drift_of_the_first():
    """With earlier layers fixed, no other last layer has a lower calibration error."""
    base, states, calibration, experts = case(mlp(), "4", (4,), step=0.6)
    method = OutputProjection(ridge=0.0, safeguard=False, task_scale="none")
    merged = method.merge(base, states, calibration)
    network = copy.deepcopy(experts["task0"])
    network.load_state_dict(merged, strict=False)
    xs = [design(network, "2", calibration, task) for task in experts]
    ys = [
        design(expert, "2", calibration, task) @ matrix(states[task], "2").T
        for task, expert in experts.items()
    ]

    def error(weights):
        return sum(((x @ weights.T - y) ** 2).sum() for x, y in zip(xs, ys, strict=True))

    best = np.linalg.lstsq(np.concatenate(xs), np.concatenate(ys), rcond=None)[0].T
    assert error(matrix(merged, "2")) == pytest.approx(error(best), rel=1e-5)
    parallel = replace(method, mode="parallel", targets="same_input")
    for other in (base, Average().merge(base, states), parallel.merge(base, states, calibration)):
        assert error(matrix(merged, "2")) <= error(matrix(other, "2"))


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize("basis", BASES)
def test_convolutions_attention_norms_and_embeddings(mode, basis):
    for base, states, calibration, experts in (
        case(Convolutions(), "head", (2, 9, 7), tasks=2),
        token_case(),
    ):
        before = {t: {n: v.clone() for n, v in s.items()} for t, s in states.items()}
        kept = {n: v.clone() for n, v in base.items()}
        method = OutputProjection(basis=basis, mode=mode, directions="reachable")
        merged, reports = _unwarned(method, base, states, calibration)
        assert list(merged) == list(base)
        for name, value in merged.items():
            assert value.dtype == base[name].dtype
            assert value.isfinite().all()
            assert torch.equal(base[name], kept[name])
        for task, state in before.items():
            assert all(torch.equal(states[task][n], v) for n, v in state.items())
            assert not experts[task].training
        assert {r.name for r in reports} >= (
            {"stem", "norm", "deep"} if "stem.weight" in base else {"embed", "norm"}
        )
        assert all(r.captured <= 1 + 1e-9 for r in reports if r.kept == "solution")


def test_rows_of_an_embedding_that_never_occur_are_averaged():
    base, states, calibration, _ = token_case()
    method = OutputProjection(mode="parallel", safeguard=False)
    merged = method.merge(base, states, calibration)
    mean = torch.stack([s["embed.weight"] for s in states.values()]).mean(0)
    torch.testing.assert_close(merged["embed.weight"][9:], mean[9:])
    assert not torch.allclose(merged["embed.weight"][:9], mean[:9])


def test_sweeps_keep_the_best_and_the_cache_changes_nothing():
    base, states, calibration, _ = token_case()
    method = OutputProjection(basis="row")
    cached = _unwarned(method, base, states, calibration)[0]
    whole = _unwarned(replace(method, cache_gigabytes=0.0), base, states, calibration)[0]
    for name, value in cached.items():
        torch.testing.assert_close(whole[name], value, atol=1e-6, rtol=1e-5)
    swept = _unwarned(replace(method, sweeps=2), base, states, calibration)[0]
    assert all(value.isfinite().all() for value in swept.values())


def test_layers_without_a_change_keep_the_base():
    base, states, calibration, experts = case(mlp(), "4", (4,))
    for task, state in states.items():
        state["0.weight"].copy_(base["0.weight"])
        state["0.bias"].copy_(base["0.bias"])
        experts[task].load_state_dict(state, strict=False)
    merged, reports = OutputProjection(mode="parallel").project(base, states, calibration)
    assert torch.equal(merged["0.weight"], base["0.weight"])
    assert math.isnan(reports[0].captured)
    assert reports[0].kept == "base"


def test_the_safeguard_keeps_a_heuristic_that_is_better_on_samples_left_out():
    base, states, calibration, _ = case(mlp(12, 30), "4", (30,), tasks=2, samples=6, step=0.05)
    # Far too few samples for 31 x 12 unknowns without a ridge.
    _, reports = _unwarned(
        OutputProjection(mode="parallel", ridge=0.0, heuristics=(TaskArithmetic(scale=0.7),)),
        base,
        states,
        calibration,
    )
    for report in reports:
        best = max(report.heuristics.values())
        if report.kept == "solution":
            assert report.held_out >= best
        else:
            assert report.held_out < best
            assert report.captured == pytest.approx(best)


def test_automatic_ridges_and_folds():
    base, states, calibration, _ = case(mlp(8, 12), "4", (12,), samples=10)
    _, reports = OutputProjection(ridge="auto", mode="parallel").project(base, states, calibration)
    assert all(report.ridge > 0 for report in reports)
    assert all(math.isfinite(report.held_out) for report in reports)
    single = OutputProjection(num_folds=None).project(base, states, calibration)[1]
    assert all(math.isnan(report.held_out) for report in single)


def gcv_by_hand(problems):
    """Best ridge of the grid for problems (design, target) towards 1/3, from hat matrices."""
    unit = np.mean([np.diag(a.T @ a).mean() for a, _ in problems])
    scores = []
    for ridge in GRID.numpy() * unit:
        rss = df = n = 0.0
        for a, b in problems:
            hat = a @ np.linalg.inv(a.T @ a + ridge * np.eye(a.shape[1])) @ a.T
            left = b - a @ np.full(a.shape[1], 1 / 3)
            rss, df, n = rss + ((left - hat @ left) ** 2).sum(), df + np.trace(hat), n + len(b)
        scores.append(n * rss / (n - 1.4 * df) ** 2)
    return float(GRID[int(np.argmin(scores))])


@pytest.mark.parametrize("basis", ["row", "task_global"])
def test_automatic_ridges_without_folds_count_the_columns_and_outputs(basis):
    base, states, calibration, experts = case(mlp(), "4", (4,), samples=6)
    method = OutputProjection(basis=basis, mode="parallel", ridge="auto", num_folds=None)
    reports = method.project(base, states, calibration)[1]
    layers = []
    for module in ("0", "2"):
        deltas = [matrix(state, module) - matrix(base, module) for state in states.values()]
        made, targets = [], []
        for (task, expert), delta in zip(experts.items(), deltas, strict=True):
            x = design(expert, module, calibration, task)
            scale = 1 / np.linalg.norm(x @ delta.T) / np.sqrt(3)
            made.append(np.stack([(scale * x @ d.T) for d in deltas], -1))
            targets.append(scale * x @ delta.T)
        A, b = np.concatenate(made), np.concatenate(targets)  # (n, o, T), (n, o)
        layers.append([(A[:, r], b[:, r]) for r in range(5)])
    if basis == "row":
        found = [gcv_by_hand(rows) for rows in layers]
    else:
        rows = [row for layer in layers for row in layer]
        stacked = (np.concatenate([a for a, _ in rows]), np.concatenate([b for _, b in rows]))
        found = [gcv_by_hand([stacked])] * 2
    assert [report.ridge for report in reports] == pytest.approx(found)
    assert {report.ridge_source for report in reports} == {"gcv"}


def test_a_ridge_for_all_layers_is_the_given_one_or_that_of_the_folds():
    base, states, calibration, _ = case(mlp(), "4", (4,))
    method = OutputProjection(basis="task_global", mode="parallel")
    sources = {}
    for ridge in (None, 0.0, 0.5, "auto"):
        report = replace(method, ridge=ridge).project(base, states, calibration)[1][0]
        sources[ridge] = (report.ridge, report.ridge_source)
    assert sources[None] == (1e-6, "default")
    assert sources[0.0] == (0.0, "given")
    assert sources[0.5] == (0.5, "given")
    assert sources["auto"][1] == "folds"


def test_a_ridge_that_samples_are_too_few_for_is_named():
    base, states, calibration, _ = case(mlp(4, 400), "4", (400,), tasks=1, samples=1)
    method = OutputProjection(mode="parallel", ridge="auto", num_folds=None)
    with pytest.warns(UserWarning, match=r"ridge='auto' cannot be chosen for 1 layers.*0 \(0.001"):
        reports = method.project(base, states, calibration)[1]
    assert reports[0].ridge == 1e-3


def test_collinear_elements_are_told_with_their_rank_and_stay_near_the_average():
    base, states, calibration, experts = case(mlp(), "4", (4,), tasks=2)
    same = dict.fromkeys(states, states["task1"])
    calibration = replace(calibration, network=lambda _: copy.deepcopy(experts["task1"]))
    method = OutputProjection(basis="task", mode="parallel", ridge=0.0, preference={"task1": 1.0})
    with pytest.warns(UserWarning, match=r"2 layers do not determine.*0 \(rank 1 of 2\)"):
        reports = method.project(base, same, calibration)[1]
    # Of all coefficients that sum to one, the preference is the nearest to itself.
    for report in reports:
        np.testing.assert_allclose(report.coefficients, [0.0, 1.0], atol=1e-6)


def test_full_without_a_ridge_changes_the_average_no_more_than_the_inputs_ask():
    base, states, calibration, experts = case(mlp(5, 30), "4", (30,), tasks=2, samples=4)
    method = OutputProjection(mode="parallel", ridge=0.0, safeguard=False, task_scale="none")
    with pytest.warns(UserWarning, match=r"layers do not determine.*0 \(rank 11 of 31\)"):
        merged = method.merge(base, states, calibration)
    mean = np.mean([matrix(state, "0") for state in states.values()], 0)
    xs = [design(expert, "0", calibration, task) for task, expert in experts.items()]
    ys = [x @ matrix(state, "0").T for x, state in zip(xs, states.values(), strict=True)]
    x, y = np.concatenate(xs), np.concatenate(ys)
    assert len(x) == 4 + 7
    expected = mean + (np.linalg.pinv(x) @ (y - x @ mean.T)).T
    np.testing.assert_allclose(matrix(merged, "0"), expected, atol=1e-5)


def test_task_coefficients_beat_every_scale_of_task_arithmetic_without_including_it():
    base, states, calibration, experts = case(mlp(), "4", (4,))
    method = OutputProjection(basis="task", mode="parallel", ridge=0.0, safeguard=False)
    merged = method.merge(base, states, calibration)
    for scale in (0.1, 0.3, 1 / 3, 0.7, 1.0):
        other = TaskArithmetic(scale=scale).merge(base, states)
        for module in ("0", "2"):
            ours, theirs = (
                sum(losses(module, base, states, experts, calibration, state).values())
                for state in (merged, other)
            )
            assert ours <= theirs + 1e-6


def test_infeasible_constraints_and_other_weights_are_refused_before_any_pass():
    base, states, calibration, _ = case(mlp(), "4", (4,))

    def network(task):
        raise AssertionError("a network was asked for")

    unused = replace(calibration, network=network)
    with pytest.raises(ValueError, match="cannot sum"):
        OutputProjection(basis="task", lower=0.0, upper=0.1, total=1.0).merge(base, states, unused)
    less = {n: v for n, v in states["task1"].items() if n != "0.bias"}
    with pytest.raises(ValueError, match=r"expert 'task1': 1 parameters missing: 0\.bias"):
        OutputProjection().merge(base, {**states, "task1": less}, unused)
    with pytest.raises(ValueError, match=r"1 parameters meta, which cannot be merged: 0\.bias"):
        meta = {**base, "0.bias": base["0.bias"].to("meta")}
        OutputProjection().merge(meta, states, unused)
    given = {task: x for task, x in calibration.inputs.items() if task != "task2"}
    with pytest.raises(ValueError, match="no calibration inputs for task2"):
        OutputProjection().merge(base, states, replace(unused, inputs=given))


def test_adapters_that_are_not_merged_are_refused():
    network = mlp()
    network[2].lora_A = torch.nn.Linear(2, 2)
    base, states, calibration, _ = case(network, "4", (4,))
    with pytest.raises(
        ValueError, match=r"layer '2' \(Linear\) is a LoRA layer; merge the adapter"
    ):
        OutputProjection().merge(base, states, calibration)


def test_bad_input_is_refused_before_any_pass():
    base, states, calibration, experts = case(mlp(), "4", (4,))
    with pytest.raises(ValueError, match=r"lower=2.0 is above upper=1.0"):
        OutputProjection(basis="task", lower=2.0, upper=1.0).merge(base, states, calibration)
    with pytest.raises(ValueError, match="cannot sum"):
        OutputProjection(basis="task", upper=0.1, lower=0.0, total=1.0).merge(
            base, states, calibration
        )
    with pytest.raises(ValueError, match="no coefficients to constrain"):
        OutputProjection(basis="full", lower=0.0)
    with pytest.raises(ValueError, match="span"):
        OutputProjection(basis="span")
    with pytest.raises(ValueError, match="parallel"):
        OutputProjection(basis="task_global")
    with pytest.raises(ValueError, match="preference of task 'task0' is -1"):
        OutputProjection(preference={"task0": -1.0, "task1": 2.0}).merge(base, states, calibration)
    inputs = calibration.inputs["task1"].tensors()["inputs"]
    inputs[3, 2] = float("nan")
    for mode in ("parallel", "sequential"):
        with pytest.raises(ValueError, match=r"layer '0', task 'task1'"):
            OutputProjection(mode=mode).merge(base, states, calibration)
    assert not any(m._forward_pre_hooks for e in experts.values() for m in e.modules())


def test_weights_that_are_computed_from_others_are_refused():
    network = mlp()
    torch.nn.utils.parametrizations.weight_norm(network[2])
    base, states, calibration, _ = case(network, "4", (4,))
    with pytest.raises(ValueError, match=r"layer '2'.*parametrization"):
        OutputProjection().merge(base, states, calibration)


def test_objectives_without_residual_moments_say_so():
    from lightning_merge.functional.bases import make_basis

    q = Quadratic(torch.eye(2)[None].double(), torch.ones(1, 2, 2).double(), 1.0)
    with pytest.raises(ValueError, match="reachable"):
        make_basis("rotated_row", q, torch.ones(1, 1, 2, 2).double())


def test_layers_too_wide_and_layers_that_never_run_are_named_and_averaged():
    base, states, calibration, _ = case(mlp(5, 9), "4", (9,))
    method = OutputProjection(mode="parallel", max_inputs=7)
    with pytest.warns(UserWarning, match=r"1 layers have more than max_inputs=7 inputs.*: 0\."):
        merged = method.merge(base, states, calibration)
    mean = Average().merge(base, states)
    assert torch.equal(merged["0.weight"], mean["0.weight"])
    assert not torch.equal(merged["2.weight"], mean["2.weight"])
