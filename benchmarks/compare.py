"""Ours against a plain torch prototype and whichever peers are installed, in turns.

python benchmarks/compare.py [--blocks 12] [--rounds 5] [--device cpu] [--only average,ties]

Prints for each method the median time of every contender, the median of the ratios to ours within
a round, the growth of the peak memory in its first round, and the largest difference of the result.
"""

import argparse
import contextlib
import io
import os
import resource
import statistics
import time
from collections.abc import Callable

import torch
from models import experts_near_base
from torch import Tensor

from lightning_merge.methods import DARE, TIES, Average, IsoC, IsoCTS, TaskArithmetic, TSVMerge

State = dict[str, Tensor]
Contender = Callable[[State, dict[str, State]], State]


def prototype_average(base: State, experts: dict[str, State]) -> State:
    merged = {}
    for name in base:
        first, *rest = (expert[name] for expert in experts.values())
        total = first / len(experts)
        for value in rest:
            total.add_(value, alpha=1 / len(experts))
        merged[name] = total
    return merged


def prototype_task_arithmetic(base: State, experts: dict[str, State]) -> State:
    merged = {}
    for name, value in base.items():
        total = value * (1 - 0.3 * len(experts))
        for expert in experts.values():
            total.add_(expert[name], alpha=0.3)
        merged[name] = total
    return merged


def task_vectors(base: State, experts: dict[str, State]) -> list[State]:
    return [{n: expert[n] - base[n] for n in base} for expert in experts.values()]


def added(base: State, update: State, scale: float = 1.0) -> State:
    return {name: value + scale * update[name] for name, value in base.items()}


def fusion_bench() -> dict[str, Contender]:
    from fusion_bench.method.isotropic_merging import iso_utils
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils
    from fusion_bench.method.ties_merging import ties_merging_utils as ties
    from fusion_bench.utils.state_dict_arithmetic import state_dict_avg, state_dict_weighted_sum

    def merge_ties(base: State, experts: dict[str, State]) -> State:
        vectors = [ties.state_dict_to_vector(v) for v in task_vectors(base, experts)]
        merged = ties.ties_merging(torch.stack(vectors), 0.2, "mean")
        return added(base, ties.vector_to_state_dict(merged, base))

    def spectral(function: Callable[..., State], *options: object) -> Contender:
        return lambda base, experts: added(
            base, function(task_vectors(base, experts), *options, accelerator="cpu")
        )

    return {
        "average": lambda _, experts: state_dict_avg(list(experts.values())),
        "task_arithmetic": lambda base, experts: added(
            base, state_dict_weighted_sum(task_vectors(base, experts), [0.3] * len(experts))
        ),
        "ties": merge_ties,
        "tsv": spectral(TSVM_utils.compute_and_sum_svd_mem_reduction),
        "iso_c": spectral(iso_utils.iso_c),
        "iso_cts": spectral(iso_utils.iso_cts, 0.8),
    }


def ours() -> dict[str, Contender]:
    return {
        "average": Average().merge,
        "task_arithmetic": TaskArithmetic(scale=0.3).merge,
        "ties": TIES(count="published").merge,
        "ties_tensor": TIES(scope="tensor").merge,
        "dare_ties": DARE(combine="ties", scale=1.0).merge,
        "tsv": TSVMerge().merge,
        "iso_c": IsoC().merge,
        "iso_cts": IsoCTS().merge,
    }


def contenders(method: str) -> dict[str, Contender]:
    found = {"ours": ours()[method]}
    prototypes = {"average": prototype_average, "task_arithmetic": prototype_task_arithmetic}
    if method in prototypes:
        found["prototype"] = prototypes[method]
    with contextlib.suppress(ImportError):
        peer = fusion_bench()
        if method in peer:
            found["fusion-bench"] = peer[method]
    return found


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default=",".join(ours()))
    options = parser.parse_args()
    base, experts = experts_near_base(options.experts, options.blocks)
    base = {n: v.to(options.device) for n, v in base.items()}
    experts = {t: {n: v.to(options.device) for n, v in e.items()} for t, e in experts.items()}
    size = sum(value.numel() for value in base.values())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()}")
    print(f"{options.experts} experts of {size / 1e6:.1f} M parameters, {options.rounds} rounds")
    for method in options.only.split(","):
        compare(method, base, experts, options.rounds)


def compare(method: str, base: State, experts: dict[str, State], rounds: int) -> None:
    runs = contenders(method)
    times: dict[str, list[float]] = {name: [] for name in runs}
    memory, results = {}, {}
    for number in range(rounds):
        for name, run in runs.items():
            before, start = peak(), time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                results[name] = run(base, experts)
            if base[next(iter(base))].is_cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
            if number == 0:
                memory[name] = peak() - before
    print(f"\n{method:16} {'median s':>9} {'x ours':>7} {'peak +GiB':>10} {'max diff':>9}")
    for name in runs:
        ratio = statistics.median(a / b for a, b in zip(times[name], times["ours"], strict=True))
        diff = max(float((results[name][n] - results["ours"][n]).abs().max()) for n in base)
        median = statistics.median(times[name])
        print(f"{name:16} {median:9.3f} {ratio:7.2f} {memory[name]:10.2f} {diff:9.1e}")


if __name__ == "__main__":
    main()
