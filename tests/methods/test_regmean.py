import copy

import numpy as np
import pytest
import torch

from lightning_merge.methods import Average, RegMean
from tests.layers.networks import Convolutions, case, mlp, token_case


def layer_inputs(network, module, inputs, kind=torch.nn.Linear):
    """What a module of a network is called with, by a hook of our own."""
    seen = []
    handle = network.get_submodule(module).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        network(inputs)
    handle.remove()
    return torch.cat(seen).double().numpy()


@pytest.mark.parametrize("a", [0.0, 0.9, 1.0])
def test_linear_layers_are_the_published_formula(a):
    base, states, calibration, experts = case(mlp(), "4", (4,))
    merged = RegMean(off_diagonal=a, ridge=1e-6).merge(base, states, calibration)
    for module in ("0", "2"):
        top, bottom, weights = 0.0, 0.0, []
        for task, expert in experts.items():
            x = layer_inputs(expert, module, calibration.inputs[task][slice(None)])
            gram = x.T @ x / len(x)
            gram = a * gram + (1 - a) * np.diag(np.diag(gram))
            weight = states[task][f"{module}.weight"].double().numpy()
            top, bottom = top + weight @ gram, bottom + gram
            weights.append(weight)
        # Tasks are weighted by 1/3 each, and so is the ridge.
        unit = np.trace(bottom / 3) / len(bottom)
        top = top / 3 + 1e-6 * unit * np.mean(weights, 0)
        expected = top @ np.linalg.inv(bottom / 3 + 1e-6 * unit * np.eye(len(bottom)))
        np.testing.assert_allclose(merged[f"{module}.weight"].numpy(), expected, atol=2e-6)
        mean = torch.stack([s[f"{module}.bias"] for s in states.values()]).mean(0)
        torch.testing.assert_close(merged[f"{module}.bias"], mean)


def test_a_single_task_and_identical_experts_give_the_expert():
    base, states, calibration, _ = case(mlp(), "4", (4,))
    one = RegMean(weights={"task1": 1.0}).merge(base, states, calibration)
    same = dict.fromkeys(states, states["task1"])
    twins = RegMean().merge(base, same, calibration)
    for name, value in states["task1"].items():
        torch.testing.assert_close(one[name], value, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(twins[name], value, atol=2e-6, rtol=1e-5)


def test_outputs_are_nearer_to_the_experts_than_those_of_the_average():
    base, states, calibration, experts = case(mlp(), "4", (4,))
    merged = RegMean(off_diagonal=1.0, ridge=0.0).merge(base, states, calibration)
    average = Average().merge(base, states)

    def error(state):
        total = 0.0
        for task, expert in experts.items():
            x = layer_inputs(expert, "2", calibration.inputs[task][slice(None)])
            weight = (state["2.weight"] - states[task]["2.weight"]).double().numpy()
            total += ((x @ weight.T) ** 2).sum() / len(x)
        return total

    assert error(merged) < error(average)


def test_convolutions_are_merged_through_their_patches():
    base, states, calibration, experts = case(Convolutions(), "head", (2, 9, 7))
    merged = RegMean(off_diagonal=1.0, tokens_per_sample=None).merge(base, states, calibration)
    top, bottom = 0.0, 0.0
    for task, expert in experts.items():
        x = torch.from_numpy(layer_inputs(expert, "stem", calibration.inputs[task][slice(None)]))
        patches = torch.nn.functional.unfold(x, 3, padding=1, stride=2)
        columns = patches.transpose(1, 2).reshape(-1, 18).numpy()
        gram = columns.T @ columns / len(columns)
        top = top + states[task]["stem.weight"].double().numpy().reshape(4, -1) @ gram
        bottom = bottom + gram
    expected = (top @ np.linalg.inv(bottom)).reshape(4, 2, 3, 3)
    np.testing.assert_allclose(merged["stem.weight"].numpy(), expected, atol=1e-4)


def test_regmean_plus_plus_takes_the_inputs_of_the_merged_network():
    base, states, calibration, experts = case(mlp(), "4", (4,))
    merged = RegMean(inputs="merged", off_diagonal=1.0, ridge=0.0).merge(base, states, calibration)
    plain = RegMean(off_diagonal=1.0, ridge=0.0).merge(base, states, calibration)
    torch.testing.assert_close(merged["0.weight"], plain["0.weight"])
    network = copy.deepcopy(experts["task0"])
    network.load_state_dict(merged, strict=False)
    top, bottom = 0.0, 0.0
    for task, state in states.items():
        x = layer_inputs(network, "2", calibration.inputs[task][slice(None)])
        gram = x.T @ x / len(x)
        top, bottom = top + state["2.weight"].double().numpy() @ gram, bottom + gram
    np.testing.assert_allclose(merged["2.weight"].numpy(), top @ np.linalg.inv(bottom), atol=1e-5)
    assert not torch.allclose(merged["2.weight"], plain["2.weight"], atol=1e-5)


def test_padding_is_left_out_of_the_second_moments():
    base, states, calibration, _ = token_case()
    merged = RegMean().merge(base, states, calibration)
    for inputs in calibration.inputs.values():
        tensors = inputs.tensors()
        tensors["input_ids"][tensors["attention_mask"] == 0] = 10
    again = RegMean().merge(base, states, calibration)
    for name, value in merged.items():
        torch.testing.assert_close(again[name], value, atol=1e-6, rtol=1e-5)


def test_bad_options_and_missing_inputs_are_refused():
    with pytest.raises(ValueError, match="off_diagonal=2"):
        RegMean(off_diagonal=2.0)
    with pytest.raises(ValueError, match="ridge=-1"):
        RegMean(ridge=-1.0)
    base, states, calibration, _ = case(mlp(), "4", (4,))
    with pytest.raises(KeyError, match="task9"):
        RegMean(weights={"task9": 1.0}).merge(base, states, calibration)
    del calibration.inputs["task1"]
    with pytest.raises(ValueError, match="no calibration inputs for task1"):
        RegMean().merge(base, states, calibration)
