import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file

from lightning_merge import MergedModel, merge_experts
from lightning_merge.correction import CorrectionOptions
from tests.networks import MLP, Tied, convnext, tuned

TASKS = ("a", "b", "c")


def merged(base, head, shape=(6,), model=None):
    experts = {task: tuned(base, seed) for seed, task in enumerate(TASKS)}
    inputs = {task: torch.randn(40, *shape) for task in TASKS}
    found = merge_experts(experts, None, inputs, base=base, head=head)
    found.model = model
    return found


@pytest.fixture
def model():
    return merged(MLP(), "net.9")


def test_a_timm_network_is_rebuilt_without_help(tmp_path):
    arguments = {
        "model_name": "convnext_atto",
        "in_chans": 1,
        "num_classes": 3,
        "depths": [1, 1, 1, 1],
        "dims": [8, 8, 8, 12],
        "patch_size": 2,
        "kernel_sizes": 3,
    }
    spec = {"class_path": "timm.create_model", "init_args": arguments}
    found = merged(convnext(), "head.fc", (1, 32, 32), spec)
    found.save(tmp_path / "merged")
    x = torch.randn(2, 1, 32, 32)
    loaded = MergedModel.load(tmp_path / "merged")
    p = {"a": 1.0, "b": 2.0}
    assert torch.equal(
        loaded.with_preference(p).eval()(x, "b"), found.with_preference(p).eval()(x, "b")
    )


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    found = merged(Tied(), "head")
    found.save(tmp_path / "merged")
    assert "second.weight" not in load_file(tmp_path / "merged" / "backbone.safetensors")
    network = MergedModel.load(tmp_path / "merged", module=Tied()).network
    assert network.first.weight is network.second.weight
    assert torch.equal(network.first.weight, found.network.first.weight)
    assert int(network.steps) == 7


def test_what_a_search_chose_is_kept(tmp_path, model, monkeypatch):
    chosen = model.correction.choices()
    model.save(tmp_path / "merged")
    loaded = MergedModel.load(tmp_path / "merged", module=MLP())
    assert loaded.choices == chosen
    assert loaded.correction.choices() == chosen


def test_a_choice_holds_for_the_metric_it_was_made_under(tmp_path, model):
    """Of five tasks the heads compete for eight features, of three they don't."""
    before = model.correction.choices()
    assert model.correction.metric == "head"
    model.save(tmp_path / "three")
    experts = {task: tuned(MLP(), seed) for seed, task in enumerate("de", start=3)}
    inputs = {task: torch.randn(40, 6) for task in experts}
    loaded = MergedModel.load(tmp_path / "three", module=MLP())
    for found in (model, loaded):
        for task, expert in experts.items():
            found.add_task(task, expert, inputs[task])
        assert found.correction.metric == "representation"
        fresh = replace(found.options, metric="representation").build(
            found.statistics, found.linear_heads()
        )
        assert found.correction.choices() == fresh.choices()
        for task in experts:
            found.drop_task(task)
        assert found.correction.metric == "head"
        assert found.correction.choices() == before


def test_what_a_mixture_chose_goes_with_its_tasks(tmp_path, model):
    model.save(tmp_path / "three")
    loaded = MergedModel.load(tmp_path / "three", module=MLP()).drop_task("b")
    two = {task: model.statistics[task] for task in ("a", "c")}
    heads = {task: model.linear_heads()[task] for task in two}
    fresh = model.options.build(two, heads).choices()
    assert loaded.correction.choices() == fresh
    assert model.drop_task("b").correction.choices() == fresh


def test_an_infinite_ridge_is_kept(tmp_path, model):
    model.options = CorrectionOptions(beta=math.inf, prior="identity")
    model.save(tmp_path / "merged")
    assert MergedModel.load(tmp_path / "merged", module=MLP()).options == model.options


def test_per_task_heads_are_those_of_the_corners(model):
    x = torch.randn(5, 6)
    own = model.per_task()
    for task in TASKS:
        torch.testing.assert_close(own(x, task), model.with_preference({task: 1.0})(x, task))


def test_unknown_tasks_are_named(model):
    steered = model.with_preference({"a": 1.0})
    with pytest.raises(ValueError, match="unknown task 'x'; known: a, b, c"):
        steered(torch.randn(1, 6), "x")
    with pytest.raises(KeyError, match="unknown task 'x'"):
        model.drop_task("x")
    with pytest.raises(ValueError, match="'a' is in the model already"):
        model.add_task("a", MLP(), torch.randn(3, 6))
    model.drop_task("a").drop_task("b")
    with pytest.raises(ValueError, match="'c' is the only task left"):
        model.drop_task("c")


def damage(folder, name):
    if name == "newer":
        manifest = json.loads((folder / "merged.json").read_text())
        manifest["format"]["version"] = 99
        (folder / "merged.json").write_text(json.dumps(manifest))
    elif name == "manifest":
        (folder / "merged.json").unlink()
    else:
        file = folder / f"{name}.safetensors"
        file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("newer", "format version 99; this release reads up to 1. Upgrade"),
        ("manifest", "merged.json does not exist"),
        ("backbone", r"backbone\.safetensors is not a readable safetensors file"),
        ("heads", r"heads\.safetensors is not a readable safetensors file"),
        ("correction", r"correction\.safetensors is not a readable safetensors file"),
    ],
)
def test_damaged_models_are_named(tmp_path, model, name, message):
    model.save(tmp_path / "merged")
    damage(tmp_path / "merged", name)
    with pytest.raises(ValueError, match=message):
        MergedModel.load(tmp_path / "merged", module=MLP())


def test_a_network_that_cannot_be_built_or_does_not_fit(tmp_path, model):
    model.save(tmp_path / "merged")
    with pytest.raises(ValueError, match="does not know how to build its network: pass the module"):
        MergedModel.load(tmp_path / "merged")
    with pytest.raises(ValueError, match="net.9|do not fit"):
        MergedModel.load(tmp_path / "merged", module=Tied())


def test_an_unwritable_place_changes_nothing(tmp_path, model):
    model.save(tmp_path / "merged")
    before = {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()}
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write"):
        model.save(tmp_path / "file" / "merged")
    assert {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()} == before


def test_a_killed_save_leaves_the_old_model(tmp_path, model):
    model.save(tmp_path / "merged")
    before = {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()}
    script = textwrap.dedent(
        f"""
        import os, signal, torch
        from lightning_merge import MergedModel, merged_folder
        from tests.networks import MLP
        model = MergedModel.load({str(tmp_path / "merged")!r}, module=MLP())
        merged_folder.write_json = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        model.save({str(tmp_path / "merged")!r})
        """
    )
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == -signal.SIGKILL
    assert {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()} == before


@pytest.mark.parametrize("task", ["a", None])
def test_exported_weights_are_those_of_the_tailored_model(tmp_path, model, task):
    path = model.export(tmp_path / "x.safetensors", {"a": 0.5, "b": 0.5}, task)
    tailored = model.with_preference({"a": 0.5, "b": 0.5}, *([task] if task else []))
    written = load_file(path)
    assert set(written) == set(tailored.state_dict())
    if task:
        plain = MLP()
        plain.load_state_dict(written)
        x = torch.randn(3, 6)
        torch.testing.assert_close(plain(x), tailored(x))


def test_an_exported_program_takes_any_batch(tmp_path, model):
    x = torch.randn(4, 6)
    path = model.export(
        tmp_path / "x.pt2", {"a": 1.0}, "a", format="torch_export", example=torch.randn(2, 6)
    )
    program = torch.export.load(path).module()
    torch.testing.assert_close(program(x), model.with_preference({"a": 1.0}, "a")(x))


def test_a_program_needs_an_example(tmp_path, model):
    with pytest.raises(ValueError, match="give example="):
        model.export(tmp_path / "x.pt2", {"a": 1.0}, "a", format="torch_export")
    assert not (tmp_path / "x.pt2").exists()


def test_timm_loads_the_tailored_model_from_its_folder(tmp_path):
    network = convnext()
    arguments = {"in_chans": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 8, 12]}
    arguments |= {"model_name": "convnext_atto", "patch_size": 2, "kernel_sizes": 3}
    spec = {"class_path": "timm.create_model", "init_args": arguments | {"num_classes": 0}}
    found = merged(network, "head.fc", (1, 32, 32), spec)
    folder = found.export(tmp_path / "timm", {"a": 0.5, "c": 0.5}, "c", format="timm")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded(x), found.with_preference({"a": 0.5, "c": 0.5}, "c").eval()(x))


def test_a_timm_folder_needs_a_network_of_timm_and_one_task(tmp_path, model):
    with pytest.raises(ValueError, match=r"built by timm\.create_model"):
        model.export(tmp_path / "timm", {"a": 1.0}, "a", format="timm")
    with pytest.raises(ValueError, match="one task"):
        model.export(tmp_path / "timm", {"a": 1.0}, format="timm")
    assert not (tmp_path / "timm").exists()
