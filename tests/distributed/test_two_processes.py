"""Two gloo processes give what one gives: nothing is padded, repeated or dropped."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from lightning_merge.cli import main
from lightning_merge.files import write_tensors
from lightning_merge.states import LazyStateDict
from tests.distributed.suite import TASKS, stages

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-merge"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    argv, sys.argv = sys.argv, ["lightning-merge"]
    stages(out, "--trainer.devices=1")
    sys.argv = argv
    torch.set_num_threads(threads)
    return out


def run_script(out, module, **env):
    """Run a script that starts its own second process; gives the finished process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OUT": str(out), **env}
    return subprocess.run(
        [sys.executable, "-m", module],
        cwd=out,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def popen(out):
    done = staged(out, "ddp")
    assert "MEMBER: 2/2" in done.stderr + done.stdout


def fork(out):
    # In a process of its own: autograd refuses to run in forks of a process that it ran in.
    staged(out, "ddp_fork")


def staged(out, strategy):
    trainer = f"--trainer.devices=2 --trainer.strategy={strategy}"
    done = run_script(out, "tests.distributed.suite", TRAINER=trainer)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("start", [popen, fork])
def test_two_processes_give_the_result_of_one(tmp_path, alone, start):
    start(tmp_path)
    for folder in ("merged", "again"):  # the callback's merge, and that of the command line
        for part, tolerance in (("correction", 1e-12), ("backbone", 1e-6), ("heads", 0)):
            ours = LazyStateDict(tmp_path / folder / f"{part}.safetensors")
            theirs = LazyStateDict(alone / folder / f"{part}.safetensors")
            assert set(ours) == set(theirs) != set()
            for name, value in theirs.items():
                torch.testing.assert_close(
                    ours[name], value, rtol=tolerance, atol=0, msg=lambda m, n=name: f"{n}: {m}"
                )
    ours = pd.read_parquet(tmp_path / "sweep" / "results.parquet")
    theirs = pd.read_parquet(alone / "sweep" / "results.parquet")
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    assert (tmp_path / "prepared.txt").read_text() == "prepared\n"


def test_every_sample_counts_once(alone):
    statistics = LazyStateDict(alone / "merged" / "correction.safetensors")
    counts = {name: value for name, value in statistics.items() if name.endswith("count")}
    assert counts, sorted(statistics)
    for task, size in zip(TASKS, (37, 23, 301), strict=True):
        assert sum(int(v.sum()) for n, v in counts.items() if n.startswith(f"{task}/")) == size


def merge_of(pool, output):
    main(
        [
            *("merge", "--trainer.accelerator=cpu", "--trainer.devices=2"),
            *("--trainer.strategy=ddp_fork", "--trainer.enable_progress_bar=false"),
            *("--model=tests.distributed.suite.Module", f"--pool={pool}", f"--output={output}"),
            "--batch_size=8",
        ]
    )


def test_an_error_of_the_first_process_ends_all(alone):
    with pytest.raises(ProcessRaisedException, match="cannot write /proc/merged"):
        merge_of(alone / "pool", "/proc/merged")


def test_an_error_of_another_process_ends_all(tmp_path, alone):
    shutil.copytree(alone / "pool", tmp_path / "pool")
    path = tmp_path / "pool" / "calibration" / "three.safetensors"
    inputs = LazyStateDict(path)
    values, header = dict(inputs), inputs.metadata
    values["inputs"][8:16] = float("nan")  # the second batch is the second process's
    write_tensors(path, values, header)
    with pytest.raises(ProcessRaisedException):
        merge_of(tmp_path / "pool", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
