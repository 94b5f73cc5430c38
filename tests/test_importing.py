import json
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_merge import ExpertPool, MergedModel, merge_experts
from lightning_merge.checkpoints import read_checkpoint
from lightning_merge.cli import main
from lightning_merge.importing import open_pool
from tests.callbacks.project import Net
from tests.networks import tuned

QUIET = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false")


class Foreign:
    """What a checkpoint holds beside its weights."""


def prefixed(state, prefix="model."):
    return {f"{prefix}{name}": value for name, value in state.items()}


def write_pt(path, state):
    torch.save(state, path)


def write_ckpt(path, state):
    hparams = {"network": Foreign()}
    torch.save({"state_dict": prefixed(state), "hyper_parameters": hparams}, path)


def write_safetensors(path, state):
    save_file({name: value.clone() for name, value in state.items()}, path)


def write_folder(path, state):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "custom"}))
    write_safetensors(path / "model.safetensors", state)


def write_shards(path, state):
    path.mkdir()
    names = sorted(state)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        write_safetensors(path / file, {n: state[n] for n in names if files[n] == file})
    index = {"metadata": {}, "weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def write_bin(path, state):
    path.mkdir()
    torch.save(state, path / "pytorch_model.bin")


WRITERS = {
    "x.pt": write_pt,
    "x.ckpt": write_ckpt,
    "x.safetensors": write_safetensors,
    "folder": write_folder,
    "shards": write_shards,
    "bin": write_bin,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_pool_is_made_from_files_alone(tmp_path, name):
    base = Net()
    expert = tuned(base, 1)
    WRITERS[name](tmp_path / name, base.state_dict())
    pool = open_pool(tmp_path / "pool", "net.9", tmp_path / name)
    assert pool.fingerprint == ExpertPool.create(tmp_path / "same", base, "net.9").fingerprint
    other = tmp_path / f"expert-{name}"
    WRITERS[name](other, expert.state_dict())
    pool.add("a", read_checkpoint(other, stand_ins=True), calibration=torch.randn(9, 6))
    pool.add("b", tuned(base, 2), calibration=torch.randn(9, 6))
    assert torch.equal(pool.expert("a")["net.0.weight"], expert.net[0].weight)
    assert torch.equal(pool.head_state("a")["weight"], expert.net[9].weight)
    assert merge_experts(pool, module=Net()).tasks == ["a", "b"]


def test_folders_are_given_to_the_pool_directly(tmp_path):
    base = Net()
    pool = ExpertPool.create(tmp_path / "pool", base, "net.9")
    expert = tuned(base, 1)
    write_shards(tmp_path / "shards", expert.state_dict())
    pool.add("a", tmp_path / "shards")
    assert torch.equal(pool.expert("a")["net.2.bias"], expert.net[2].bias)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.md").write_text("nothing")
    with pytest.raises(ValueError, match=r"holds none of model.safetensors, .* only readme.md"):
        pool.add("b", tmp_path / "empty")


def test_a_timm_folder_knows_its_network(tmp_path):
    arguments = {"num_classes": 4, "in_chans": 1}
    base = timm.create_model("test_convnext", **arguments)
    for name, network in (("base", base), ("a", tuned(base, 1)), ("b", tuned(base, 2))):
        timm.models.save_for_hf(network, tmp_path / name, model_args={"in_chans": 1})
    pool = open_pool(tmp_path / "pool", "head.fc", tmp_path / "base")
    for task in "ab":
        pool.add(task, tmp_path / task, calibration=torch.randn(6, 1, 32, 32))
    model = merge_experts(pool)
    model.save(tmp_path / "merged")
    loaded = MergedModel.load(tmp_path / "merged")
    assert loaded.with_preference({"a": 1.0}, "a")(torch.randn(2, 1, 32, 32)).shape == (2, 4)


class Inputs:
    pass


def test_the_command_line_imports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-merge"])
    monkeypatch.chdir(tmp_path)
    base = Net()
    write_ckpt("base.ckpt", base.state_dict())
    spec = '--spec={"class_path": "tests.callbacks.project.Net"}'
    for seed, task in enumerate(["a", "b"]):
        write_ckpt(f"{task}.ckpt", tuned(base, seed).state_dict())
        save_file({"inputs": torch.randn(9, 6)}, f"{task}-inputs.safetensors")
        main(
            [
                *("import", *QUIET, "--pool=pool", f"--task={task}", f"--checkpoint={task}.ckpt"),
                *(f"--calibration={task}-inputs.safetensors", "--head=net.9", "--base=base.ckpt"),
                spec,
            ]
        )
    assert "pool: added 'b'" in capsys.readouterr().out
    main(["merge", *QUIET, "--pool=pool", "--output=merged"])
    assert MergedModel.load("merged").tasks == ["a", "b"]
    data = ("--data=tests.distributed.suite.Suite", "--task=one", "--checkpoint=a.ckpt")
    main(["import", *QUIET, "--pool=pool", *data, "--num_calibration=5"])
    assert len(ExpertPool.open("pool").calibration("one")) == 5


MISTAKES = {
    "no pool": (("--pool=none", "--task=a", "--checkpoint=a.pt"), "none is no expert pool yet"),
    "no head": (("--pool=new", "--task=a", "--checkpoint=a.pt", "--base=a.pt"), "--head"),
    "no such head": (
        ("--pool=new", "--task=a", "--checkpoint=a.pt", "--base=a.pt", "--head=fc"),
        "no parameters below the head 'fc'. Its matrices, last first: net.9, net.8",
    ),
    "no file": (("--pool=pool", "--task=a", "--checkpoint=x.pt"), "x.pt does not exist"),
    "taken": (("--pool=pool", "--task=old", "--checkpoint=a.pt"), "already has an expert 'old'"),
    "other": (("--pool=pool", "--task=a", "--checkpoint=b.pt"), "does not hold the backbone"),
    "base": (
        ("--pool=pool", "--task=a", "--checkpoint=a.pt", "--base=a.pt", "--head=net.9"),
        "holds another base",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", ["lightning-merge"])
    monkeypatch.chdir(tmp_path)
    base = Net()
    pool = ExpertPool.create("pool", base, "net.9")
    pool.add("old", tuned(base, 3))
    write_pt("a.pt", tuned(base, 1).state_dict())
    write_pt("b.pt", nn.Linear(2, 2).state_dict())
    words, message = MISTAKES[name]
    with pytest.raises(SystemExit):
        main(["import", *QUIET, *words])
    (line,) = [li for li in capsys.readouterr().err.splitlines() if "error: " in li]
    assert message in line
    assert pool.tasks == ["old"]
