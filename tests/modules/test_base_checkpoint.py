import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_merge.modules.base_checkpoint import load_base


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
    load_base(target, "head", path)
    for name, tensor in source["body"].state_dict().items():
        assert torch.equal(target["body"].state_dict()[name], tensor), name
    assert torch.equal(target["head"].weight, head)


def test_a_head_name_is_not_a_prefix_of_other_names(tmp_path):
    source = nn.ModuleDict({"head": nn.Linear(2, 2), "header": nn.Linear(2, 2)})
    torch.save({"header.weight": torch.ones(2, 2), "header.bias": torch.ones(2)}, tmp_path / "b.pt")
    load_base(source, "head", tmp_path / "b.pt")
    assert torch.equal(source["header"].bias, torch.ones(2))


def test_what_does_not_fit_is_listed_and_nothing_changes(tmp_path):
    target = network(seed=2)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    torch.save(wrap(network(width=5).state_dict(), "net."), tmp_path / "base.pt")
    with pytest.raises(ValueError, match=r"base.pt: .*'body.0.weight' \(5, 2\) vs \(4, 2\)"):
        load_base(target, "head", tmp_path / "base.pt")
    state = network().state_dict()
    del state["body.1.bias"]
    torch.save(wrap(state, "net."), tmp_path / "base.pt")
    message = (
        r"base.pt does not hold .* 1 of 7 parameters are missing: body.1.bias; .* level: net\."
    )
    with pytest.raises(ValueError, match=message):
        load_base(target, "head", tmp_path / "base.pt")
    for name, tensor in target.state_dict().items():
        assert torch.equal(before[name], tensor)


class Plain:
    pass


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pt", None, "missing.pt does not exist"),
        (
            "objects.ckpt",
            {"state_dict": {}, "hyper_parameters": Plain()},
            "could run code",
        ),
        ("empty.ckpt", {"state_dict": {}}, "holds no state dict of tensors"),
        ("list.pt", [1, 2], "holds no state dict of tensors"),
        ("junk.pt", b"not a checkpoint", "cannot be read as a checkpoint"),
        ("none.pt", b"", "cannot be read as a checkpoint"),
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
        load_base(network(), "head", path)


def test_a_truncated_checkpoint_is_explained(tmp_path):
    path = tmp_path / "base.ckpt"
    torch.save(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"base\.ckpt cannot be read as a checkpoint"):
        load_base(network(), "head", path)
