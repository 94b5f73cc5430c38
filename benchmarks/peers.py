"""The peers' own functions, behind one signature: all that the benchmarks know of their interfaces.

Each peer is loaded in the process that runs it.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

State = dict[str, Tensor]
Contender = Callable[[State, dict[str, State]], State]


def task_vectors(base: State, experts: dict[str, State]) -> list[State]:
    return [{n: expert[n] - base[n] for n in base} for expert in experts.values()]


def added(base: State, update: State, scale: float = 1.0) -> State:
    return {name: value + scale * update[name] for name, value in base.items()}


def fusion_bench() -> dict[str, Contender]:
    from fusion_bench.method.dare.utils import module_random_drop_
    from fusion_bench.method.isotropic_merging import iso_utils
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils
    from fusion_bench.method.ties_merging import ties_merging_utils as ties
    from fusion_bench.utils.state_dict_arithmetic import state_dict_avg, state_dict_weighted_sum

    def merge_ties(base: State, vectors: list[State], density: float) -> State:
        rows = torch.stack([ties.state_dict_to_vector(v) for v in vectors])
        merged = ties.ties_merging(rows, density, "mean")
        return added(base, ties.vector_to_state_dict(merged, base))

    def dare_ties(base: State, experts: dict[str, State]) -> State:
        vectors = task_vectors(base, experts)
        for vector in vectors:
            module_random_drop_(vector, 0.9, rescale=True)
        return merge_ties(base, vectors, 0.999)

    def spectral(function: Callable[..., State], *options: object) -> Contender:
        return lambda base, experts: added(
            base, function(task_vectors(base, experts), *options, accelerator="cpu")
        )

    return {
        "average": lambda _, experts: state_dict_avg(list(experts.values())),
        "task_arithmetic": lambda base, experts: added(
            base, state_dict_weighted_sum(task_vectors(base, experts), [0.3] * len(experts))
        ),
        "linear": lambda _, experts: state_dict_avg(list(experts.values())),
        "ties": lambda base, experts: merge_ties(base, task_vectors(base, experts), 0.2),
        "dare_ties": dare_ties,
        "tsv": spectral(TSVM_utils.compute_and_sum_svd_mem_reduction),
        "iso_c": spectral(iso_utils.iso_c),
        "iso_cts": spectral(iso_utils.iso_cts, 0.8),
    }


def mergekit() -> dict[str, Contender]:
    from mergekit.merge_methods.base import TensorBatch
    from mergekit.merge_methods.generalized_task_arithmetic import (
        ConsensusMethod,
        GeneralizedTaskArithmeticMerge,
    )
    from mergekit.merge_methods.linear import linear_merge
    from mergekit.sparsify import SparsificationMethod

    def linear(_: State, experts: dict[str, State]) -> State:
        weight, merged = torch.ones(1, len(experts)), {}
        for name in next(iter(experts.values())):
            batch = TensorBatch([expert[name][None] for expert in experts.values()])
            merged[name] = linear_merge.implementation(batch, weight=weight)[0]
        return merged

    def arithmetic(consensus: object, sparse: object, **options: object) -> Contender:
        peer = GeneralizedTaskArithmeticMerge(
            consensus_method=consensus,
            sparsification_method=sparse,
            default_normalize=False,
            default_rescale=False,
            method_name="compared",
            method_pretty_name=None,
            method_reference_url=None,
        )

        def run(base: State, experts: dict[str, State]) -> State:
            tasks = range(len(experts))
            shared = {
                "weight": dict.fromkeys(tasks, 1.0),
                "density": dict.fromkeys(tasks, options.get("density", 1.0)),
                "lambda": options.get("scale", 1.0),
                "normalize": consensus is not None,
                "rescale": False,
                "int8_mask": False,
            }
            merged = {}
            for name, value in base.items():
                entries = [
                    SimpleNamespace(id=t, tensor=e[name]) for t, e in enumerate(experts.values())
                ]
                group = SimpleNamespace(base=SimpleNamespace(tensor=value), non_base=entries)
                merged[name] = peer.merge_group(group, **shared)
            return merged

        return run

    return {
        "average": linear,
        "linear": linear,
        "task_arithmetic": arithmetic(None, None, scale=0.3),
        "ties": arithmetic(ConsensusMethod.sum, SparsificationMethod.magnitude, density=0.2),
        "dare_ties": arithmetic(ConsensusMethod.sum, SparsificationMethod.random, density=0.1),
    }


PEERS = {"fusion-bench": fusion_bench, "mergekit": mergekit}
MODULES = {"fusion-bench": "fusion_bench", "mergekit": "mergekit"}


@cache
def installed() -> list[str]:
    """The peers that are here; whether their functions can be loaded is seen when they run.

    Asked once: a peer that is loaded may deny that it can be found.
    """
    return [name for name, module in MODULES.items() if importlib.util.find_spec(module)]
