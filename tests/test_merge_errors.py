import pytest
import torch
from torch import nn

from lightning_merge import merge_experts
from lightning_merge.correction.validation import cross_validated_errors
from lightning_merge.merge_errors import merge_errors
from lightning_merge.merging import calibration_for
from lightning_merge.methods import Average, TaskArithmetic
from lightning_merge.runtime import Runtime
from tests.layers.networks import Convolutions, experts_of, mlp


@pytest.mark.parametrize(
    ("network", "head", "shape"),
    [
        (mlp(), "4", (4,)),
        (Convolutions(), "head", (2, 7, 7)),
    ],
)
def test_errors_are_those_of_one_merge_after_the_other(network, head, shape):
    network.eval()
    experts = experts_of(network, 3)
    inputs = {task: torch.randn(60, *shape) for task in experts}
    given = calibration_for(experts, inputs, base=network, head=head, batch_size=16)
    methods = {"base": TaskArithmetic(scale=0.0), "average": Average()}
    states = {name: method.merge(given.base, given.experts) for name, method in methods.items()}
    found = merge_errors(given, states)
    for name, method in methods.items():
        model = merge_experts(
            experts, method, inputs, base=network, head=head, batch_size=16, report="off"
        )
        expected = cross_validated_errors(model.correction, None, heads=model.linear_heads())
        for task, error in found[name].tasks.items():
            assert error.corrected == pytest.approx(expected[task].corrected, rel=1e-9)
            assert error.identity == pytest.approx(expected[task].identity, rel=1e-9)
        mean = sum(e.corrected for e in expected.values()) / 3
        assert found[name].corrected == pytest.approx(mean, rel=1e-9)


def test_each_expert_runs_once_for_all_merges():
    network = mlp().eval()
    experts = experts_of(network, 2)
    inputs = {task: torch.randn(40, 4) for task in experts}
    given = calibration_for(experts, inputs, base=network, head="4", batch_size=40)
    runs: list[nn.Module] = []
    plain = given.calibration.network

    def counted(task):
        expert = plain(task)
        expert.register_forward_pre_hook(lambda module, _: runs.append(module))
        return expert

    object.__setattr__(given.calibration, "network", counted)
    merge_errors(given, {"base": given.base, "same": given.base, "again": given.base})
    per_network = [sum(run is module for run in runs) for module in dict.fromkeys(runs)]
    # Two experts once each; three merged networks once a task.
    assert sorted(per_network) == [1, 1, 2, 2, 2]


def test_stages_are_shown_by_name():
    network = mlp().eval()
    experts = experts_of(network, 2)
    inputs = {task: torch.randn(40, 4) for task in experts}
    shown = []

    def progress(items, total, description, note=None):
        items = list(items)
        assert len(items) == total
        shown.append((description, [note(item) for item in items] if note else None))
        return items

    runtime = Runtime(progress=progress)
    given = calibration_for(experts, inputs, base=network, head="4", runtime=runtime)
    merge_errors(given, {"base": given.base})
    assert shown[-1] == ("Correcting", ["base"])
    assert ("Calibrating task0", None) in shown
