"""A run that is killed while it writes leaves the old artifact or the new one."""

import os
import signal
import sys

import pytest
import torch

from lightning_merge import MergedModel, files, merge_experts
from tests.networks import MLP, tuned

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
TOUCHING = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod"}


def killed_before(step, work) -> bool:
    """Run ``work`` in a child that is killed before its ``step``-th file operation."""
    child = os.fork()
    if child == 0:
        seen = 0

        def watch(event, args):
            nonlocal seen
            if event in TOUCHING:
                seen += 1
                if seen > step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_killed_merge_leaves_the_old_model_or_the_new_one(tmp_path, monkeypatch, exchange):
    base = MLP()
    experts = {task: tuned(base, seed) for seed, task in enumerate("ab")}
    inputs = {task: torch.randn(9, 6) for task in "ab"}
    old = merge_experts(experts, None, inputs, base=base, head="net.9")
    new = merge_experts(experts, None, inputs, base=base, head="net.9")
    new.record["method"]["init_args"]["weights"] = "new"
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *paths: False)
    path = tmp_path / "merged"
    found = set()
    for step in range(200):
        old.save(path)
        killed = killed_before(step, lambda: new.save(path))
        if not path.exists():
            # Without an exchange there is one instant between two renames, with the old one kept.
            assert not exchange
            continue
        found.add(MergedModel.load(path, module=base).record["method"]["init_args"]["weights"])
        if not killed:
            break
    assert not killed
    assert found == {None, "new"}
