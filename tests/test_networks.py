import copy

import pytest
import torch
from torch import nn

from lightning_merge import networks
from tests.networks import KINDS, MLP, DeepHead, make, tuned


@pytest.mark.parametrize("kind", KINDS)
def test_backbone_and_head_are_the_whole_network(kind):
    network, head, _ = make(kind)
    backbone, own = networks.split_state(network, head)
    assert set(backbone) | {f"{head}.{name}" for name in own} == set(network.state_dict())
    assert own
    assert not any(name.startswith(f"{head}.") for name in backbone)


@pytest.mark.parametrize("kind", KINDS)
def test_representation_is_what_the_first_linear_layer_reads(kind):
    network, head, shape = make(kind)
    x = torch.randn(5, *shape)
    z = networks.representation(network, head, x)
    _, layer = networks.first_linear(networks.get_submodule(network, head), head)
    seen = {}
    layer.register_forward_hook(lambda module, args, output: seen.update(out=output))
    network(x)
    torch.testing.assert_close(seen["out"], layer(z))
    assert z.shape == (5, layer.in_features)


@pytest.mark.parametrize("kind", KINDS)
def test_loading_a_backbone_copies_it_and_nothing_else(kind):
    base, head, shape = make(kind)
    expert = tuned(base, 1)
    target = copy.deepcopy(base)
    networks.load_backbone(target, networks.split_state(expert, head)[0], head)
    networks.set_submodule(target, head, networks.get_submodule(expert, head))
    x = torch.randn(4, *shape)
    torch.testing.assert_close(target(x), expert(x))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_wrapper_parts_of_names_are_dropped(prefix):
    state = MLP().state_dict()
    wrapped = {f"{prefix}{name}": value for name, value in state.items()}
    assert set(networks.clean_names(wrapped)) == set(state)


def test_a_users_own_module_attribute_is_kept():
    state = {"module.weight": torch.zeros(1), "other.weight": torch.zeros(1)}
    assert set(networks.clean_names(state)) == set(state)


def test_compiled_networks_are_seen_through():
    network = MLP()
    compiled = torch.compile(network)
    assert networks.get_submodule(compiled, "net.9") is network.net[9]
    assert set(networks.named_state(compiled)) == set(network.state_dict())
    nested = nn.Sequential(torch.compile(MLP()))
    copied = networks.plain_copy(nested)
    assert type(copied[0]) is MLP
    assert type(nested[0]) is not MLP


def test_a_copy_can_leave_out_what_a_module_refers_to():
    network = MLP()
    network.owner = [object()]
    network.boss = network.owner[0]
    copied = networks.plain_copy(network, without=network.boss)
    assert copied.boss is None
    assert network.boss is not None


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_heads_of_other_sizes_are_built(classes):
    template = DeepHead(3).classifier
    state = DeepHead(classes).classifier.state_dict()
    head = networks.build_head(template, state)
    assert head[-1].out_features == classes
    assert head(torch.randn(4, 8)).shape == (4, classes)
    for name, value in head.state_dict().items():
        assert torch.equal(value, state[name])
        assert value.data_ptr() != state[name].data_ptr()


def test_a_linear_head_is_built_in_the_place_of_no_head():
    head = networks.build_head(nn.Identity(), nn.Linear(4, 2).state_dict())
    assert head(torch.zeros(1, 4)).shape == (1, 2)


def test_a_head_without_bias_is_built_from_one_with():
    head = networks.build_head(nn.Linear(4, 2), {"weight": torch.zeros(3, 4)})
    assert head.bias is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: networks.get_submodule(MLP(), "net.11"), r"no submodule '11'.*last first: net\.9"),
        (
            lambda: networks.get_submodule(MLP(), "heads"),
            "no submodule 'heads', only 'net'",
        ),
        (lambda: networks.first_linear(nn.Conv2d(1, 1, 1), "head"), "no nn.Linear"),
        (lambda: networks.split_state(MLP(), "net"), "the whole network"),
        (lambda: networks.load_backbone(MLP(), {"x": torch.zeros(1)}, "net.9"), "'x' is not in"),
        (lambda: networks.load_backbone(MLP(), {}, "net.9"), "is missing"),
        (
            lambda: networks.load_backbone(MLP(), {"net.0.weight": torch.zeros(1)}, "net.9"),
            r"\(1,\) vs \(8, 6\)",
        ),
        (lambda: networks.build_head(nn.Linear(1, 1), {"a": torch.zeros(1)}), r"\['a', 'weight'\]"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_head_that_the_forward_pass_does_not_use():
    network = DeepHead()
    network.unused = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="never reaches"):
        networks.representation(network, "unused", torch.randn(2, 6))
