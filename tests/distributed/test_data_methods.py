"""Methods that look at data give in two gloo processes what they give in one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_merge.files import write_tensors
from lightning_merge.methods import AdaMerging, Fisher, GreedySoup
from lightning_merge.runtime import Runtime
from lightning_merge.states import LazyStateDict
from tests.methods.calibrated import setting

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
METHODS = {
    "adamerging": AdaMerging(steps=4, batch_size=5, lr=0.02, bn_every=2, loss="both"),
    "fisher": Fisher(samples=7, samples_at_once=2),
    "greedy_soup": GreedySoup(),
}


def summed(value):
    total = value.clone()
    dist.all_reduce(total)
    return total


def process(rank, folder):
    torch.set_num_threads(1)
    address = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    runtime = Runtime(rank=rank, world_size=2, reduce=summed)
    base, experts, calibration = setting("resnet", samples=9, runtime=runtime)
    for name, method in METHODS.items():
        write_tensors(f"{folder}/{name}{rank}", method.merge(base, experts, calibration))
    dist.destroy_process_group()


def test_two_processes_give_the_result_of_one(tmp_path):
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    base, experts, calibration = setting("resnet", samples=9)
    for method_name, method in METHODS.items():
        alone = method.merge(base, experts, calibration)
        first, second = (LazyStateDict(tmp_path / f"{method_name}{rank}") for rank in range(2))
        for name, value in alone.items():
            torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5)
            assert torch.equal(first[name], second[name])
