import json

import pytest
import torch

from lightning_merge import MergedModel, merge_experts
from lightning_merge.backbones import parse_size, read_backbone, write_backbone
from lightning_merge.shards import INDEX
from tests.networks import make, tuned


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("3 KiB", 3072), ("0.5MB", 500_000), ("77", 77)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1MB", "0", "5 PB", "1e9"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="expected a size such as 5GB"):
        parse_size(text)


def test_one_file_up_to_the_size(tmp_path):
    tensors = {"a": torch.arange(10.0), "b": torch.arange(5.0)}
    write_backbone(tmp_path, tensors, 60)
    assert [path.name for path in tmp_path.iterdir()] == ["backbone.safetensors"]
    assert torch.equal(read_backbone(tmp_path)["b"], tensors["b"])


@pytest.mark.parametrize("kind", ["mlp", "tied", "resnet"])
def test_a_sharded_model_is_loaded_as_it_was(kind, tmp_path):
    base, head, _ = make(kind)
    experts = {task: tuned(base, seed) for seed, task in enumerate("ab")}
    model = merge_experts(experts, base=base, head=head, correction=None)
    model.save(tmp_path / "m", shard_size=100)
    assert not (tmp_path / "m" / "backbone.safetensors").exists()
    index = json.loads((tmp_path / "m" / "backbone" / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 1
    found = MergedModel.load(tmp_path / "m", module=base)
    for name, value in model.network.state_dict().items():
        if not name.startswith(f"{head}."):
            assert torch.equal(found.network.state_dict()[name], value)
    found.save(tmp_path / "m")
    assert (tmp_path / "m" / "backbone.safetensors").exists()
    assert not (tmp_path / "m" / "backbone").exists()
