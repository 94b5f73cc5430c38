"""Layers solved by two gloo processes, as by one."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import start_processes

from lightning_merge.methods import OutputProjection, RegMean
from lightning_merge.runtime import Runtime
from tests.layers.networks import case

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
METHODS = (
    OutputProjection(basis="row"),
    OutputProjection(basis="block", max_inputs=4),
    OutputProjection(basis="full", mode="parallel", sweeps=1),
    RegMean(inputs="merged"),
)


def network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 3))


def merges(runtime=None):
    """Odd sizes: one process has fewer batches than the other, for one task none."""
    base, states, calibration, _ = case(
        network(), "3", (4,), tasks=2, samples=13, batch_size=13, runtime=runtime
    )
    return [method.merge(base, states, calibration) for method in METHODS]


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)

    def reduce(value):
        dist.all_reduce(value)
        return value

    merged = merges(Runtime(rank=rank, world_size=2, reduce=reduce))
    torch.save(merged, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_result_of_one(tmp_path):
    # Forked: nothing here runs autograd, and a new interpreter takes seconds.
    start_processes(work, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for ours, theirs, alone in zip(first, second, merges(), strict=True):
        for name, value in alone.items():
            assert torch.equal(ours[name], theirs[name])
            torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6)
