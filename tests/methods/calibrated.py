"""Networks, experts and calibrations for the tests of methods that look at data."""

import copy

import torch
from torch import nn

from lightning_merge.calibration import CalibrationInputs
from lightning_merge.methods import Calibration
from lightning_merge.networks import split_state
from lightning_merge.runtime import Runtime
from tests.networks import make, tuned


def resized(network, head, classes):
    """Give the last linear layer of the head another number of outputs."""
    name, layer = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.".startswith(f"{head}.")
    ][-1]
    parent, _, leaf = name.rpartition(".")
    network.get_submodule(parent)._modules[leaf] = nn.Linear(layer.in_features, classes)
    return network


def setting(kind="mlp", classes=(3, 5, 2), samples=20, amount=0.3, runtime=None, seed=0):
    """``(base, experts, calibration)`` of a small network, with heads of several sizes."""
    torch.manual_seed(seed)
    network, head, shape = make(kind)
    tasks = [f"task{t}" for t in range(len(classes))]
    modules = {}
    for t, (task, size) in enumerate(zip(tasks, classes, strict=True)):
        modules[task] = resized(tuned(network, seed + t, amount), head, size).eval()
    inputs = {task: CalibrationInputs.collect(torch.randn(samples, *shape)) for task in tasks}
    calibration = Calibration(
        network=lambda task: copy.deepcopy(modules[task]),
        head=head,
        inputs=inputs,
        runtime=runtime or Runtime(),
        batch_size=8,
    )
    experts = {task: split_state(module, head)[0] for task, module in modules.items()}
    return split_state(network, head)[0], experts, calibration


class Lockstep:
    """Two processes in one: runs a function for every rank in threads, sums between them."""

    def __init__(self, size=2):
        import threading

        self.size = size
        self.barrier = threading.Barrier(size)
        self.values = [None] * size

    def runtime(self, rank):
        def reduce(value):
            self.values[rank] = value
            self.barrier.wait()
            total = torch.stack(self.values).sum(0)
            self.barrier.wait()
            return total

        return Runtime(rank=rank, world_size=self.size, reduce=reduce)

    def run(self, function):
        from concurrent.futures import ThreadPoolExecutor

        def guarded(rank):
            try:
                return function(self.runtime(rank))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(guarded, range(self.size)))
