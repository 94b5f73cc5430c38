"""How small the compressed stores make a pool's experts, and what they lose of them.

python -m benchmarks.stores SUITE [--root runs/bench]

The experts are those that benchmarks.suites trained, of all seeds.

The error is the distance of a rebuilt expert's floating-point values from the expert, relative to
its task vector's norm: 1 is the base itself. The agreement is the share of calibration inputs (at
most 500 a task) to which the rebuilt expert gives the expert's answer. Prints the table of
docs/methods/compress.md, means over tasks and seeds.
"""

import argparse
import math
import tempfile
from pathlib import Path
from statistics import fmean

import torch
from torch import nn

from benchmarks.suites import ROOT, SUITES
from lightning_merge.methods import TALLCompress, TSVCompress
from lightning_merge.networks import (
    build_head,
    call_network,
    get_submodule,
    load_backbone,
    logits_of,
    set_submodule,
)
from lightning_merge.pool import ExpertPool
from lightning_merge.states import StateDict

MOST = 500
STORES: dict[str, TSVCompress | TALLCompress] = {
    "TSVCompress()": TSVCompress(),
    "TSVCompress(rank=8)": TSVCompress(rank=8),
    "TSVCompress(rank=32)": TSVCompress(rank=32),
    'TSVCompress(convolutions="mean")': TSVCompress(convolutions="mean"),
    "TALLCompress(threshold=0.2)": TALLCompress(threshold=0.2),
    "TALLCompress()": TALLCompress(),
    "TALLCompress(threshold=0.6)": TALLCompress(threshold=0.6),
}


def measure(
    store: TSVCompress | TALLCompress, pool: ExpertPool, network: nn.Module
) -> tuple[float, float, float]:
    """File size in bases, and the mean error and agreement of an expert."""
    base = dict(pool.base)
    experts = {task: pool.expert(task) for task in pool.tasks}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.safetensors"
        opened = store.save(path, base, experts)
        rebuilt = {task: opened.expert(task, base) for task in experts}
        size = path.stat().st_size / (pool.path / "base.safetensors").stat().st_size
    errors = [
        distance(rebuilt[task], expert) / distance(base, expert) for task, expert in experts.items()
    ]
    agreeing = [
        (answers(network, pool, task, rebuilt[task]) == answers(network, pool, task, expert))
        .double()
        .mean()
        for task, expert in experts.items()
    ]
    return size, fmean(errors), fmean(map(float, agreeing))


@torch.inference_mode()
def answers(network: nn.Module, pool: ExpertPool, task: str, backbone: StateDict) -> torch.Tensor:
    """Classes that a backbone with the task's head gives to its calibration inputs."""
    load_backbone(network, backbone, pool.head)
    head = build_head(get_submodule(network, pool.head), pool.head_state(task))
    set_submodule(network, pool.head, head)
    inputs = pool.calibration(task)
    assert inputs is not None
    return logits_of(call_network(network.eval(), inputs[slice(0, MOST)])).argmax(1)


def distance(one: StateDict, other: StateDict) -> float:
    """Norm of the difference of two models' floating-point values."""
    squares = (
        torch.linalg.vector_norm(one[name].double() - other[name].double()) ** 2
        for name in one
        if one[name].is_floating_point()
    )
    return math.sqrt(sum(float(square) for square in squares))


def main() -> None:
    """Print a row for each store."""
    parser = argparse.ArgumentParser()
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument("--root", type=Path, default=ROOT)
    options = parser.parse_args()
    pools = [
        ExpertPool.open(path.parent) for path in (options.root / options.suite).glob("*/pool.json")
    ]
    network, number = SUITES[options.suite].network(), len(pools[0].tasks)
    print(f"| {options.suite} | size ({number} experts: {number}) | error | agreement |")
    print("| --- | ---: | ---: | ---: |")
    for name, store in STORES.items():
        rows = [measure(store, pool, network) for pool in pools]
        means = [fmean(column) for column in zip(*rows, strict=True)]
        print(f"| `{name}` | " + " | ".join(f"{value:.3f}" for value in means) + " |")


if __name__ == "__main__":
    main()
