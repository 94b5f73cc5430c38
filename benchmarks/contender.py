"""One contender of the comparison, in a process of its own: loads once, runs when it is told to.

The process reads the models mapped from files, so that all contenders share one copy of them in
memory, and answers every line on its standard input with a line of JSON.
"""

import argparse
import contextlib
import ctypes
import io
import json
import resource
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks import peers
from benchmarks.peers import Contender, State
from benchmarks.prototypes import PROTOTYPES
from lightning_merge.methods import DARE, TIES, Average, IsoC, IsoCTS, TaskArithmetic, TSVMerge
from lightning_merge.shards import write_sharded
from lightning_merge.states import LazyStateDict

OURS: dict[str, Contender] = {
    "average": Average().merge,
    "linear": Average().merge,
    "task_arithmetic": TaskArithmetic(scale=0.3).merge,
    "ties": TIES(count="published").merge,
    "dare_ties": DARE(combine="ties", scale=1.0).merge,
    "tsv": TSVMerge().merge,
    "iso_c": IsoC().merge,
    "iso_cts": IsoCTS().merge,
}


def contender(name: str, method: str) -> Contender | None:
    """What a contender has for a method, if it has it."""
    if name == "ours":
        return OURS[method]
    if name == "prototype":
        return PROTOTYPES.get(method)
    return peers.PEERS[name]().get(method)


def file_to_file(name: str, run: Contender) -> Contender:
    """Read, merge, write: ``base`` and ``experts`` hold paths."""

    def ours(base: State, experts: dict[str, State]) -> State:
        lazy = {task: LazyStateDict(path) for task, path in experts.items()}
        origin = LazyStateDict(base)
        folder = Path(base).parent / "ours"
        (path,) = write_sharded(folder, Average().stream(origin, lazy), origin)
        return LazyStateDict(path)

    def theirs(base: State, experts: dict[str, State]) -> State:
        opened = LazyStateDict if name == "prototype" else load_file
        states = {task: opened(path) for task, path in experts.items()}
        path = Path(base).parent / f"merged_{name}.safetensors"
        save_file(run(opened(base), states), path)
        return LazyStateDict(path)

    return ours if name == "ours" else theirs


def forget_freed_memory() -> None:
    """Give the allocator's free pages back: every result gets new ones, as the first one does.

    Else it is luck which contender writes into the pages of its last result, and that is a third
    of the time of an average.
    """
    with contextlib.suppress(OSError, AttributeError):  # glibc alone
        ctypes.CDLL(None).malloc_trim(0)


def timed(run: Contender, base: State, experts: dict[str, State]) -> tuple[State, float, float]:
    forget_freed_memory()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = run(base, experts)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return result, wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def loaded(path: Path, device: str) -> State:
    """A model on the device, its pages mapped before anything is timed."""
    state = {name: value.to(device) for name, value in load_file(path).items()}
    for value in state.values():
        value.sum()
    return state


def difference(result: State, reference: Path, ours: bool) -> dict[str, float]:
    """Largest difference from what ours wrote, and entries that are off by over 1e-6 of all."""
    if ours and not reference.exists():
        save_file({n: result[n].detach().cpu().clone() for n in result}, reference)
    if not reference.exists():
        return {"difference": float("nan"), "off": float("nan")}
    wanted = LazyStateDict(reference)
    largest, off, size = 0.0, 0, 0
    for name in wanted:
        gap = (result[name].cpu() - wanted[name]).abs()
        largest, off = max(largest, float(gap.max())), off + int((gap > 1e-6).sum())
        size += gap.numel()
    return {"difference": largest, "off": off / size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("method")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--experts", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with contextlib.redirect_stdout(sys.stderr):
        run = contender(options.name, options.method)
    if run is None:
        print(json.dumps({"absent": True}))
        return
    paths = {t: options.folder / f"{t}.safetensors" for t in range(options.experts)}
    base: State | Path = options.folder / "base.safetensors"
    if options.method == "linear":
        run = file_to_file(options.name, run)
        experts = paths
    else:
        base = loaded(base, options.device)
        experts = {f"task{t}": loaded(path, options.device) for t, path in paths.items()}
    print(json.dumps({"ready": True}), flush=True)
    reference = options.folder / f"reference_{options.method}.safetensors"
    for _ in sys.stdin:
        result, wall, cpu = timed(run, base, experts)
        print(json.dumps({"wall": wall, "cpu": cpu}), flush=True)
        print(json.dumps(difference(result, reference, options.name == "ours")), flush=True)
        del result


if __name__ == "__main__":
    main()
