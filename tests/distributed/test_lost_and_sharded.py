"""A process that is killed in the middle, and weights that are shards."""

import pytest
import torch
from torch import nn

from lightning_merge import ExpertPool, MergedModel, merge_experts
from lightning_merge.lost import LostProcessError, naming_lost_processes
from lightning_merge.networks import split_state
from tests.callbacks.project import Classifier, Net, samples
from tests.distributed.dying import Fragile
from tests.distributed.suite import TASKS
from tests.distributed.test_two_processes import run_script
from tests.networks import tuned

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = "tests.distributed.dying"


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("stage", ["merge", "sweep"])
def test_a_killed_process_ends_the_stage_and_the_next_run_completes_it(tmp_path, stage):
    base = Fragile()
    pool = ExpertPool.create(tmp_path / "pool", base, "head")
    for seed, task in enumerate(TASKS):
        pool.add(task, tuned(base, seed), calibration=samples(seed, 60)[0])
    if stage == "sweep":
        merge_experts(pool, module=base).save(tmp_path / "merged")
    before = contents(tmp_path)
    killed = run_script(tmp_path, SCRIPT, STAGE=stage, DIE="1")
    assert killed.returncode != 0
    assert "another process was killed or lost its connection" in killed.stderr, killed.stderr
    assert "Traceback" not in killed.stderr.split("lightning-merge: error")[-1]
    assert contents(tmp_path) == before
    done = run_script(tmp_path, SCRIPT, STAGE=stage, DIE="")
    assert done.returncode == 0, done.stderr
    assert (
        tmp_path / {"merge": "merged/merged.json", "sweep": "sweep/summary.json"}[stage]
    ).exists()


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes differ"), naming_lost_processes("x"):
        raise RuntimeError("shapes differ")
    with (
        pytest.raises(LostProcessError, match="during the merge"),
        naming_lost_processes("the merge"),
    ):
        raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1")


def test_sharded_weights_are_recorded_whole(tmp_path):
    done = run_script(tmp_path, "tests.distributed.sharded", TASKS=",".join(TASKS))
    assert done.returncode == 0, done.stderr
    pool, start = ExpertPool.open(tmp_path / "pool"), Classifier()
    for name, value in split_state(start.model, "net.9")[0].items():
        assert torch.equal(pool.base[name], value), name
    # One step on eight samples, four a process: the gradient of their mean.
    x, y = samples(0, 8)
    nn.functional.cross_entropy(start(x), y).backward()
    with torch.no_grad():
        for value in start.parameters():
            value -= 0.05 * value.grad
    backbone, head = split_state(start.model, "net.9")
    for task in TASKS:
        for name, value in backbone.items():
            torch.testing.assert_close(pool.expert(task)[name], value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(pool.head_state(task)["bias"], head["bias"])
    model = MergedModel.load(tmp_path / "merged", module=Net())
    assert model.tasks == TASKS
    assert model.record["calibration"] == {"one": 37, "two": 23, "three": 301}
