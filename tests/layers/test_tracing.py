import copy

import pytest
import torch
from torch import nn

from lightning_merge.layers.sites import find_sites
from lightning_merge.layers.tracing import trace
from tests.layers.networks import Tokens
from tests.networks import Tied

KINDS = ("linear", "convolution", "attention", "norm", "embedding")


class Shared(nn.Module):
    """Two layers read one tensor, one layer runs twice, one never; one input is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.q(x) + self.k(x)
        x = self.twice(torch.tanh(self.twice(x)))
        y = self.last(x)
        return self.head(x.relu_() + y)


def sites_of(network, head="head"):
    return find_sites(network, head, list(network.state_dict()), KINDS)


def test_layers_come_in_their_order_with_shared_inputs_and_repeats():
    network = Shared().eval()
    found = trace(network, sites_of(network).handled, torch.randn(2, 4))
    assert [[s.name for s in g.sites] for g in found.groups] == [["q", "k"], ["twice"], ["last"]]
    assert [g.calls for g in found.groups] == [2, 2, 1]
    assert [s.name for s in found.unused] == ["never"]
    assert not any(m._forward_pre_hooks for m in network.modules())


def test_blocks_of_a_list_follow_each_other():
    network = Tokens().eval()
    ids = torch.zeros(2, 5, dtype=torch.int64)
    found = trace(network, sites_of(network).handled, {"input_ids": ids})
    assert found.chained == {"blocks.0": "blocks.1"}
    assert found.groups[0].block is None
    assert {g.block for g in found.groups} == {None, "blocks.0", "blocks.1"}
    parts = [s.part for g in found.groups for s in g.sites if "0.self_attn" in s.name]
    assert parts == ["q", "k", "v", "out"]


def test_tied_layers_are_one_problem():
    network = Tied().eval()
    found = sites_of(network)
    (site,) = found.handled
    assert site.modules == ("first", "second")
    assert set(site.weights) == {"first.weight", "second.weight"}
    order = trace(network, found.handled, torch.randn(2, 6))
    assert order.groups[0].calls == 2


def test_what_is_left_to_the_fallback_is_named_with_its_reason():
    network = nn.ModuleDict(
        {
            "up": nn.ConvTranspose2d(2, 2, 3),
            "norm": nn.LayerNorm(3),
            "head": nn.Linear(3, 3),
        }
    )
    found = find_sites(network, "head", list(network.state_dict()), ("linear",))
    assert found.handled == ()
    assert "transposed convolutions are not supported" in found.left["up"]
    assert "not asked for" in found.left["norm"]


def test_scripted_modules_are_refused():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[0] = torch.jit.script(copy.deepcopy(network[0]))
    with pytest.raises(ValueError, match=r"layer '0' .* takes no hooks; use the eager module"):
        find_sites(network, "1", list(network.state_dict()), KINDS)
