"""Ours against a plain torch prototype and whichever peers are installed, in turns.

python -m benchmarks.compare [--quick] [--only average,ties] [--rounds 5] [--device cpu]

Of every row: medians, the median of the ratios to ours within a round, the growth of anonymous
memory in a process of its own, and the largest difference of the result. A contender that fails or
takes too long is reported with the reason. Writes docs/results/methods_speed.md.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import load_file, save_file

from benchmarks import peers
from benchmarks.models import experts_near_base
from benchmarks.peers import Contender, State
from benchmarks.prototypes import PROTOTYPES
from lightning_merge.methods import DARE, TIES, Average, IsoC, IsoCTS, TaskArithmetic, TSVMerge
from lightning_merge.shards import write_sharded
from lightning_merge.states import LazyStateDict

RESULT = Path("docs/results/methods_speed.md")
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


@dataclass(frozen=True)
class Row:
    """One line of the table: ``blocks`` of 12, in ``threads`` (0: as the machine has)."""

    title: str
    method: str
    blocks: int
    threads: int = 0
    peers: bool = True


ROWS = {
    "average": Row("average, in memory", "average", 12),
    "task_arithmetic": Row("task arithmetic, in memory", "task_arithmetic", 12),
    "linear": Row("linear merge, file to file", "linear", 12),
    "ties": Row("TIES top 20 %, 2 of 12 blocks", "ties", 2),
    "dare_ties": Row("DARE-TIES, 2 blocks", "dare_ties", 2),
    "tsv": Row("TSV-M, 2 blocks", "tsv", 2),
    "iso_c": Row("Iso-C, 2 blocks", "iso_c", 2),
    "iso_cts": Row("Iso-CTS, 2 blocks", "iso_cts", 2),
    # the peers need 20 GiB, or minutes, for these
    "ties_whole": Row("TIES, whole model, 1 thread", "ties", 12, 1, peers=False),
    "tsv_whole": Row("TSV-M, whole model, 1 thread", "tsv", 12, 1, peers=False),
}
QUICK = ("ties", "dare_ties", "tsv", "iso_c", "iso_cts")


def contenders(row: Row) -> dict[str, Contender]:
    found = {"ours": OURS[row.method]}
    if row.method in PROTOTYPES:
        found["prototype"] = PROTOTYPES[row.method]
    if row.peers:
        found |= {n: p[row.method] for n, p in peers.installed()[0].items() if row.method in p}
    return {n: file_to_file(n, run) for n, run in found.items()} if is_linear(row) else found


def is_linear(row: Row) -> bool:
    return row.method == "linear"


def file_to_file(name: str, run: Contender) -> Contender:
    """Read, merge, write: ``base`` and ``experts`` hold paths, under the name "path"."""

    def ours(base: State, experts: dict[str, State]) -> State:
        lazy = {task: LazyStateDict(path) for task, path in experts.items()}
        origin = LazyStateDict(base)
        sizes = {n: 4 * origin[n].numel() for n in origin}
        (path,) = write_sharded(Path(base).parent / "ours", Average().stream(origin, lazy), sizes)
        return LazyStateDict(path)

    def theirs(base: State, experts: dict[str, State]) -> State:
        opened = LazyStateDict if name == "prototype" else load_file
        states = {task: opened(path) for task, path in experts.items()}
        path = Path(base).parent / f"{name}.safetensors"
        save_file(run(opened(base), states), path)
        return LazyStateDict(path)

    return ours if name == "ours" else theirs


@contextlib.contextmanager
def inputs(row: Row, options: argparse.Namespace) -> Iterator[tuple[State, dict[str, State]]]:
    torch.set_num_threads(row.threads or options.threads)
    base, experts = experts_near_base(options.experts, min(row.blocks, options.blocks))
    if not is_linear(row):
        base = {n: v.to(options.device) for n, v in base.items()}
        for task, state in experts.items():
            experts[task] = {n: v.to(options.device) for n, v in state.items()}
        yield base, experts
        return
    with tempfile.TemporaryDirectory(dir=".") as folder:
        states = {"base": base, **experts}
        paths = {name: str(Path(folder) / f"{name}.safetensors") for name in states}
        for name in list(states):
            save_file(states.pop(name), paths[name])
        base, experts = {}, {}
        yield paths.pop("base"), paths


@contextlib.contextmanager
def limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def timed(run: Contender, base: State, experts: dict[str, State], device: str) -> tuple:
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = run(base, experts)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return result, wall, cpu


def compare(key: str, options: argparse.Namespace) -> list[list[str]]:
    row = ROWS[key]
    failed: dict[str, str] = {}
    seconds: dict[str, list[float]] = {}
    cpus: dict[str, list[float]] = {}
    differences: dict[str, float] = {}
    with inputs(row, options) as (base, experts):
        runs = contenders(row)
        for _ in range(options.rounds):
            reference = None
            for name in [n for n in runs if n not in failed]:
                try:
                    with limit(options.limit):
                        result, wall, cpu = timed(runs[name], base, experts, options.device)
                except Exception as error:
                    failed[name] = f"{type(error).__name__}: {error}"[:90]
                    continue
                seconds.setdefault(name, []).append(wall)
                cpus.setdefault(name, []).append(cpu)
                reference = result if name == "ours" else reference
                if name not in differences and reference is not None:
                    differences[name] = max(
                        float((result[n] - reference[n]).abs().max()) for n in reference
                    )
                del result
    lines = []
    for name in runs:
        label = row.title if name == "ours" else ""
        if name in failed:
            lines.append([label, name, failed[name], "", "", "", ""])
            continue
        ours = seconds.get("ours", seconds[name])
        ratio = statistics.median(a / b for a, b in zip(seconds[name], ours, strict=False))
        lines.append(
            [
                label,
                name,
                f"{statistics.median(seconds[name]):.2f}",
                f"{statistics.median(cpus[name]):.2f}",
                f"{ratio:.2f}",
                memory(key, name, options),
                f"{differences.get(name, float('nan')):.0e}",
            ]
        )
        print("  ".join(lines[-1]), flush=True)
    return lines


def memory(key: str, name: str, options: argparse.Namespace) -> str:
    """Growth of anonymous memory of one contender, in a process of its own."""
    if options.no_memory:
        return "-"
    command = [sys.executable, "-m", "benchmarks.compare", "--probe", key, name]
    for option in ("experts", "blocks", "threads", "device"):
        command += [f"--{option}", str(getattr(options, option))]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=4 * options.limit, check=True
        )
        return f"{json.loads(done.stdout.splitlines()[-1]):.2f}"
    except (subprocess.SubprocessError, ValueError, IndexError):
        return "failed"


def probe(key: str, name: str, options: argparse.Namespace) -> None:
    row, peak, stop = ROWS[key], [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    with inputs(row, options) as (base, experts):
        run, before = contenders(row)[name], anonymous()
        watcher = threading.Thread(target=watch)
        watcher.start()
        timed(run, base, experts, options.device)
        stop.set()
        watcher.join()
    print(json.dumps(max(0, peak[0] - before) / 2**20))


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def start_up() -> list[list[str]]:
    """CPU seconds of a fresh process that imports what a merge of two files needs."""
    imports = {
        "torch alone": "torch",
        "ours": "lightning_merge.methods, lightning_merge.shards",
        "fusion-bench": "fusion_bench.utils.state_dict_arithmetic",
        "mergekit": "mergekit.merge",
    }
    rows = []
    for name, modules in imports.items():
        found = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run([sys.executable, "-c", f"import {modules}"], capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        failed = "not installed" if done.returncode else f"{min(found):.2f}"
        rows.append([name, failed])
    return rows


def versions() -> str:
    found = []
    for name in ("torch", "numpy", "fusion-bench", "mergekit"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def accuracy() -> list[list[str]]:
    """Relative error of one matrix by TSV-M against singular value decompositions in float64."""
    base, experts = experts_near_base(8, 1)
    name = "blocks.0.attn.out_proj.weight"
    base = {name: base[name]}
    experts = {task: {name: state[name]} for task, state in experts.items()}
    sides = [torch.linalg.svd((e[name] - base[name]).double(), False) for e in experts.values()]
    rank = 768 // 8
    u, v = torch.cat([s[0][:, :rank] for s in sides], 1), torch.cat([s[2][:rank] for s in sides])
    values = torch.cat([s[1][:rank] for s in sides])
    polar = [a @ b for a, _, b in (torch.linalg.svd(m, False) for m in (u, v))]
    exact = polar[0] * values @ polar[1]
    lines = []
    for who, run in contenders(ROWS["tsv"]).items():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            # in float64 the sum with the base does not round away what is compared
            wide = {n: v.double() for n, v in base.items()} if who == "ours" else base
            update = run(wide, experts)[name].double() - base[name].double()
            lines.append([who, f"{float((update - exact).norm() / exact.norm()):.0e}"])
    return lines


def table(header: list[str], rows: list[list[str]]) -> str:
    aligned = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, aligned, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=12, help="at most this many a row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, default=300, help="seconds a contender may take")
    parser.add_argument("--quick", action="store_true", help="only the rows of two blocks")
    parser.add_argument("--only", default="")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        probe(*options.probe, options)
        return
    keys = options.only.split(",") if options.only else QUICK if options.quick else tuple(ROWS)
    where = (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{options.threads} threads, load {os.getloadavg()[0]:.1f}; Python "
        f"{platform.python_version()}, {versions()}."
    )
    print(where)
    missing = peers.installed()[1]
    rows = [line for key in keys for line in compare(key, options)]
    header = ["row", "contender", "median s", "CPU s", "x ours", "+GiB", "difference"]
    sections = [
        "# Speed and memory of the weight-space methods",
        f"Made by `python -m benchmarks.compare {' '.join(sys.argv[1:])}`".rstrip(),
        f"{where} {options.experts} experts of ViT-B/32 shapes in float32, {options.rounds} rounds "
        "in turns; `x ours` is the median of the ratios within a round.",
        table(header, rows),
        table(["import", "CPU s"], start_up()),
    ]
    if "tsv" in keys:
        sections.append("Relative error of TSV-M against float64 singular value decompositions:")
        sections.append(table(["contender", "error"], accuracy()))
    if missing:
        sections.append("Left out: " + "; ".join(f"{n} ({why})" for n, why in missing.items()))
    print("\n\n".join(sections))
    if not options.no_write:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
