import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_merge.modules.base_checkpoint import load_backbone, read_checkpoint


def network(seed=0, width=4, classes=3):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
    return nn.ModuleDict({"body": body, "head": nn.Linear(width, classes)})


def wrap(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("prefix", ["", "network.", "model.encoder.", "model._orig_mod."])
@pytest.mark.parametrize("kind", ["safetensors", "state dict", "lightning"])
def test_the_backbone_is_found_behind_any_prefix_and_the_head_is_kept(tmp_path, prefix, kind):
    source, target = network(seed=1, classes=9), network(seed=2)
    head = target["head"].weight.clone()
    state = wrap(source.state_dict(), prefix) | {"loss.weight": torch.ones(2)}
    path = tmp_path / ("base.safetensors" if kind == "safetensors" else "base.ckpt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        content = {"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 0.1}}
        torch.save(content if kind == "lightning" else state, path)
    load_backbone(target, "head", path)
    for name, tensor in source["body"].state_dict().items():
        assert torch.equal(target["body"].state_dict()[name], tensor), name
    assert torch.equal(target["head"].weight, head)


def test_a_head_name_is_not_a_prefix_of_other_names(tmp_path):
    source = nn.ModuleDict({"head": nn.Linear(2, 2), "header": nn.Linear(2, 2)})
    torch.save({"header.weight": torch.ones(2, 2), "header.bias": torch.ones(2)}, tmp_path / "b.pt")
    load_backbone(source, "head", tmp_path / "b.pt")
    assert torch.equal(source["header"].bias, torch.ones(2))


def test_what_does_not_fit_is_listed_and_nothing_changes(tmp_path):
    state = network(width=5).state_dict()
    del state["body.1.bias"]
    torch.save(wrap(state, "net."), tmp_path / "base.pt")
    target = network(seed=2)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    message = (
        r"base.pt does not hold the backbone of ModuleDict: 1 parameters missing: body.1.bias; "
        r"5 parameters of another shape: 'body.0.weight' \(5, 2\) vs \(4, 2\).* in the file: net\."
    )
    with pytest.raises(ValueError, match=message):
        load_backbone(target, "head", tmp_path / "base.pt")
    for name, tensor in target.state_dict().items():
        assert torch.equal(before[name], tensor)


class Plain:
    pass


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pt", None, "missing.pt does not exist"),
        ("objects.ckpt", {"state_dict": {}, "hyper_parameters": Plain()}, "could run code"),
        ("empty.ckpt", {"state_dict": {}}, "holds no tensors"),
        ("list.pt", [1, 2], "holds no tensors"),
        ("junk.pt", b"not a checkpoint", "could run code|not a readable checkpoint"),
        ("none.pt", b"", "not a readable checkpoint"),
        ("junk.safetensors", b"\x00\x01", "not a readable safetensors file"),
    ],
)
def test_unreadable_files_are_explained(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


def test_a_truncated_checkpoint_is_explained(tmp_path):
    path = tmp_path / "base.ckpt"
    torch.save(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"base\.ckpt is not a readable checkpoint"):
        read_checkpoint(path)
