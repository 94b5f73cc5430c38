import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cosine_similarity

from lightning_merge.modules import ImageTower
from lightning_merge.modules.fixed_heads import load_fixed_head
from lightning_merge.networks import representation
from lightning_merge.pool import build_network

SMALL = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}


def tower(unit_length="scores", **more):
    network = ImageTower(dim=8, num_classes=3, unit_length=unit_length, model_args=SMALL, **more)
    torch.nn.init.zeros_(network.head.bias)
    return network.eval()


@pytest.mark.parametrize("unit_length", ["scores", "representation"])
def test_scores_are_cosines(unit_length):
    network, images = tower(unit_length), torch.randn(4, 3, 32, 32)
    embedding = network.tower(images)
    expected = cosine_similarity(embedding[:, None], network.head.weight[None], dim=-1)
    expected = expected * network.head.weight.norm(dim=1)
    torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-6)


def test_the_representation_is_the_embedding_or_has_length_one():
    images = torch.randn(4, 3, 32, 32)
    network = tower("representation")
    found = representation(network, "head", images)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    network = tower("scores")
    torch.testing.assert_close(representation(network, "head", images), network.tower(images))


def test_the_spec_builds_the_same_network_without_asking_for_weights():
    network, images = tower(), torch.randn(2, 3, 32, 32)
    built = build_network(network.network_spec)
    built.load_state_dict(network.state_dict())
    assert torch.equal(built.eval()(images), network(images))
    assert "pretrained" not in network.network_spec["init_args"]


def test_the_projection_has_no_trained_bias():
    network = tower()
    assert not network.tower.head.bias.any()
    assert not network.tower.head.bias.requires_grad


def test_a_sweep_may_answer_for_several_preferences():
    class Twice(torch.nn.Module):
        def forward(self, z):
            return torch.cat([z, 2 * z])

    network, images = tower(), torch.randn(3, 3, 32, 32)
    network.head = Twice()
    first, second = network(images).chunk(2)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(second, 2 * first)


def test_fixed_heads_are_loaded_and_not_trained(tmp_path):
    network = tower()
    weight = torch.randn(3, 8)
    save_file({"weight": weight, "bias": torch.zeros(3)}, tmp_path / "a.safetensors")
    load_fixed_head(network, "head", tmp_path / "a.safetensors")
    assert torch.equal(network.head.weight, weight)
    assert not network.head.weight.requires_grad
    save_file({"weight": weight[:2], "bias": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"'weight' \(2, 8\) vs \(3, 8\)"):
        load_fixed_head(network, "head", tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="no fixed head at"):
        load_fixed_head(network, "head", tmp_path / "c.safetensors")


@pytest.mark.slow
def test_the_real_architecture_takes_a_training_step():
    network = ImageTower()
    assert sum(value.numel() for value in network.tower.parameters()) == 87_849_728
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
    images, labels = torch.randn(2, 3, 224, 224), torch.tensor([0, 1])
    before = network.tower.patch_embed.proj.weight.detach().clone()
    torch.nn.functional.cross_entropy(network(images), labels).backward()
    optimizer.step()
    assert not torch.equal(before, network.tower.patch_embed.proj.weight)
    assert network.head.in_features == 512
