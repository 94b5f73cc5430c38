import json
import multiprocessing
import pickle
import warnings
from pathlib import Path

import pytest
import torch

from lightning_merge.checkpoints import read_checkpoint
from lightning_merge.files import save_tensors
from lightning_merge.networks import split_state
from lightning_merge.pool import ExpertPool, build_network
from lightning_merge.states import fingerprint
from tests.networks import KINDS, MLP, make, tuned

HEAD = "net.9"


@pytest.fixture
def base():
    return MLP()


@pytest.fixture
def pool(tmp_path, base):
    return ExpertPool.create(tmp_path / "pool", base, HEAD)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_comes_back(tmp_path, kind):
    base, head, shape = make(kind)
    pool = ExpertPool.create(tmp_path, base, head)
    expert, inputs = tuned(base, 1), torch.randn(5, *shape)
    pool.add("digits", expert, calibration=inputs, scores={"val/accuracy": 0.5})
    backbone, own = split_state(expert, head)
    stored = pool.expert("digits")
    assert set(stored) == set(pool.base)
    assert all(torch.equal(stored[name], backbone[name]) for name in stored)
    assert all(torch.equal(v, own[name]) for name, v in pool.head_state("digits").items())
    assert torch.equal(pool.calibration("digits")[slice(1, 3)], inputs[1:3])
    assert pool.scores("digits") == {"val/accuracy": 0.5}
    assert pool.tasks == ["digits"]


@pytest.mark.parametrize("source", ["module", "state", "compiled", "ddp", "lightning", "file"])
def test_experts_come_in_many_forms(tmp_path, pool, base, source):
    expert = tuned(base, 3)
    state = expert.state_dict()
    if source == "module":
        given = expert
    elif source == "state":
        given = state
    elif source == "compiled":
        given = torch.compile(expert)
    elif source == "ddp":
        given = {f"module.{name}": value for name, value in state.items()}
    elif source == "lightning":
        given = tmp_path / "last.ckpt"
        inner = {f"model.net._orig_mod.{name}": value for name, value in state.items()}
        torch.save({"state_dict": {**inner, "loss.weight": torch.ones(2)}, "epoch": 1}, given)
    else:
        given = tmp_path / "expert.safetensors"
        save_tensors(given, state)
    pool.add("a", given)
    assert torch.equal(pool.expert("a")["net.0.weight"], expert.net[0].weight)
    assert torch.equal(pool.head_state("a")["weight"], expert.net[9].weight)


def test_half_precision_is_kept(tmp_path):
    base = MLP().to(torch.bfloat16)
    pool = ExpertPool.create(tmp_path, base, HEAD)
    pool.add("a", tuned(base, 1))
    assert pool.expert("a")["net.0.weight"].dtype == torch.bfloat16


def test_named_inputs_and_batches_of_them(pool, base):
    batches = [{"ids": torch.full((3, 2), i), "mask": torch.ones(3, 2)} for i in range(4)]
    pool.add("a", tuned(base, 1), calibration=batches)
    found = pool.calibration("a")
    assert len(found) == 12
    assert torch.equal(found[slice(2, 4)]["ids"], torch.tensor([[0, 0], [1, 1]]))


def test_adding_again_replaces_only_when_asked(pool, base):
    pool.add("a", tuned(base, 1), calibration=torch.randn(3, 6))
    before = snapshot(pool.path)
    with pytest.raises(ValueError, match="already has an expert 'a'.*overwrite=True"):
        pool.add("a", tuned(base, 2))
    assert snapshot(pool.path) == before
    pool.add("a", tuned(base, 2), overwrite=True)
    assert pool.calibration("a") is None
    pool.remove("a")
    assert pool.tasks == []


def test_opening_and_creating_again(pool, base):
    again = ExpertPool.create(pool.path, base, HEAD, exist_ok=True)
    assert again.fingerprint == pool.fingerprint == fingerprint(split_state(base, HEAD)[0])
    with pytest.raises(ValueError, match="is a pool already"):
        ExpertPool.create(pool.path, base, HEAD)
    with pytest.raises(ValueError, match="holds another base"):
        ExpertPool.create(pool.path, tuned(base, 1), HEAD, exist_ok=True)
    with pytest.raises(ValueError, match=r"has the head 'net.9', found 'net.8'"):
        ExpertPool.create(pool.path, base, "net.8", exist_ok=True)


def _add(path: str, task: str, seed: int) -> None:
    torch.set_num_threads(1)
    pool = ExpertPool.open(path)
    base = MLP()
    base.load_state_dict(dict(pool.base), strict=False)
    pool.add(task, tuned(base, seed), calibration=torch.randn(4, 6))


def test_several_processes_add_at_a_time(pool):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add, args=(str(pool.path), f"t{i}", i)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert pool.tasks == ["t0", "t1"]
    assert all(len(pool.calibration(task)) == 4 for task in pool.tasks)


class Foreign:
    """Something that weights_only=True refuses."""


BAD = {
    "other shapes": (
        lambda base: widened(base),
        r"expert 'a'.*'net.0.weight' \(9, 6\) vs \(8, 6\)",
    ),
    "a missing key": (lambda base: without(base, "net.2.bias"), r"'net\.2\.bias'|does not hold"),
    "an extra key": (lambda base: {**base.state_dict(), "extra": torch.ones(1)}, "extra"),
    "NaN": (lambda base: spoiled(base), r"'a': parameter 'net.2.weight' holds 1 non-finite"),
    "no head": (lambda base: split_state(base, HEAD)[0], "no parameters below its head"),
}


def widened(base):
    state = base.state_dict()
    state["net.0.weight"] = torch.zeros(9, 6)
    return state


def without(base, name):
    return {key: value for key, value in base.state_dict().items() if key != name}


def spoiled(base):
    state = {key: value.clone() for key, value in base.state_dict().items()}
    state["net.2.weight"][0, 0] = float("nan")
    return state


@pytest.mark.parametrize("name", BAD)
def test_unfit_experts_are_refused_and_the_pool_stays(pool, base, name):
    make_expert, message = BAD[name]
    before = snapshot(pool.path)
    with pytest.raises(ValueError, match=message):
        pool.add("a", make_expert(base), calibration=torch.randn(3, 6))
    assert snapshot(pool.path) == before


@pytest.mark.parametrize("task", ["../x", "a/b", "", ".hidden", "a b", "x\0"])
def test_task_names_that_are_paths(pool, base, task):
    before = snapshot(pool.path)
    with pytest.raises(ValueError, match="task name .* expected letters, digits"):
        pool.add(task, base)
    assert snapshot(pool.path) == before


def test_another_base(pool, base):
    with pytest.raises(ValueError, match="fine-tuned from another base"):
        pool.add("a", base, trained_from="0" * 64)
    other = ExpertPool.create(pool.path.parent / "other", tuned(base, 9), HEAD)
    other.add("b", tuned(base, 8))
    for part in ("experts", "heads"):
        (pool.path / part).mkdir(exist_ok=True)
        (pool.path / part / "b.safetensors").write_bytes(
            (other.path / part / "b.safetensors").read_bytes()
        )
    with pytest.raises(ValueError, match="'b' in .* belongs to another base"):
        pool.expert("b")


def test_an_expert_from_a_random_initialisation_is_noticed(pool):
    with pytest.warns(UserWarning, match="implausibly far from the base"):
        pool.add("a", MLP())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool.add("b", tuned(filled_from(pool), 1, amount=0.01))


def filled_from(pool):
    network = MLP()
    network.load_state_dict(dict(pool.base), strict=False)
    return network


@pytest.mark.parametrize("inputs", [torch.zeros(0, 6), [], {}])
def test_empty_calibration(pool, base, inputs):
    before = snapshot(pool.path)
    with pytest.raises(ValueError, match="calibration inputs are empty"):
        pool.add("a", tuned(base, 1), calibration=inputs)
    assert snapshot(pool.path) == before


def test_unknown_and_wordless_tasks(pool):
    with pytest.raises(ValueError, match="has no expert 'x'; it has: none yet"):
        pool.expert("x")
    with pytest.raises(ValueError, match="does not know how to build its network"):
        pool.network()


def test_truncated_files_are_named(pool, base):
    pool.add("a", tuned(base, 1))
    file = pool.path / "experts" / "a.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.safetensors is not a readable safetensors file"):
        pool.expert("a")


def test_files_of_two_additions_are_not_mixed(pool, base):
    pool.add("a", tuned(base, 1))
    head = (pool.path / "heads" / "a.safetensors").read_bytes()
    pool.add("a", tuned(base, 2), overwrite=True)
    (pool.path / "heads" / "a.safetensors").write_bytes(head)
    with pytest.raises(ValueError, match="does not belong to the expert 'a' beside it"):
        pool.head_state("a")


def test_a_newer_format(pool):
    manifest = json.loads((pool.path / "pool.json").read_text())
    manifest["format"]["version"] = 99
    (pool.path / "pool.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="format version 99; this release reads up to 1. Upgrade"):
        ExpertPool.open(pool.path)


def test_a_checkpoint_that_needs_unpickling(tmp_path, pool, base):
    expert = tuned(base, 1)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": expert.state_dict(), "hyper_parameters": {"x": Foreign()}}, path)
    with pytest.raises(ValueError, match=r"needs unpickling of .*Foreign.*stand_ins=True"):
        pool.add("a", path)
    pool.add("a", read_checkpoint(path, stand_ins=True))
    assert torch.equal(pool.expert("a")["net.0.weight"], expert.net[0].weight)


def test_a_malicious_checkpoint_does_nothing(tmp_path, pool):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Evil()}, path)
    with pytest.raises(ValueError, match="needs unpickling"):
        pool.add("a", path)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint of tensors"):
        read_checkpoint(path, stand_ins=True)
    assert not (tmp_path / "owned").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps([1, 2])])
def test_files_that_are_no_checkpoints(tmp_path, pool, content):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.ckpt"):
        pool.add("a", path)


def test_an_unwritable_pool(tmp_path, base):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write"):
        ExpertPool.create(tmp_path / "file" / "pool", base, HEAD)


def test_only_networks_are_built():
    with pytest.raises(ValueError, match=r"neither an nn\.Module"):
        build_network({"class_path": "os.system", "init_args": {"command": "true"}})
    with pytest.raises(ValueError, match="cannot import 'nowhere.Net'"):
        build_network({"class_path": "nowhere.Net"})
    with pytest.raises(ValueError, match="cannot build"):
        build_network({"class_path": "torch.nn.Linear", "init_args": {"x": 1}})
    arguments = {"in_features": 2, "out_features": 1}
    network = build_network({"class_path": "torch.nn.Linear", "init_args": arguments})
    assert network.in_features == 2
