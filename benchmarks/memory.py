"""A large model merged file to file under a limit on anonymous memory.

python -m benchmarks.memory [--gigabytes 2] [--limit 1.5] [--experts 8] [--folder .]

The experts are two files that take turns, so that the disk holds three models, not nine; the merge
reads all of them. Each method runs in a process of its own, which a thread watches: it ends the
process where its anonymous memory passes the limit. (A limit of the system on the data segment
would count the mapped files too, since they are mapped privately.) Writes
docs/results/methods_memory.md.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from lightning_merge.methods import TIES, Average, TSVMerge
from lightning_merge.shards import write_sharded
from lightning_merge.states import LazyStateDict

METHODS = {"Average": Average(), "TIES": TIES(), "TSVMerge": TSVMerge()}


def write_models(folder: Path, gigabytes: float, shape: tuple[int, int]) -> list[Path]:
    """A base and two experts near it, of matrices of one shape."""
    number = max(1, round(gigabytes * 1e9 / (4 * math.prod(shape))))
    paths = []
    for seed, name in enumerate(("base", "even", "odd")):
        generator = torch.Generator().manual_seed(0)
        state = {
            f"layers.{i}.weight": 0.03 * torch.randn(shape, generator=generator)
            for i in range(number)
        }
        generator.manual_seed(seed)
        for value in state.values() if seed else ():
            value += 6e-4 * torch.randn(shape, generator=generator)
        paths.append(folder / f"{name}.safetensors")
        save_file(state, paths[-1])
    return paths


def merge(method: str, folder: Path, experts: int, limit: float) -> dict[str, float]:
    """Merge under the limit, in this process."""
    peak = [0.0]
    threading.Thread(target=watch, args=(peak, limit), daemon=True).start()
    torch.set_num_threads(1)
    base = LazyStateDict(folder / "base.safetensors")
    files = [folder / "even.safetensors", folder / "odd.safetensors"]
    states = {f"task{t}": LazyStateDict(files[t % 2]) for t in range(experts)}
    whole = (folder / "base.safetensors").stat().st_size
    start = time.perf_counter()
    stream = METHODS[method].stream(base, states)
    write_sharded(folder / method, stream, base, max_bytes=whole // 2)
    return {"seconds": time.perf_counter() - start, "anonymous_gb": peak[0]}


def watch(peak: list[float], limit: float) -> None:
    while True:
        lines = Path("/proc/self/status").read_text().splitlines()
        anonymous = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        peak[0] = max(peak[0], anonymous * 1024 / 1e9)
        if peak[0] > limit:
            print(f"anonymous memory of {peak[0]:.2f} GB", file=sys.stderr, flush=True)
            os._exit(1)
        time.sleep(0.002)


def run(method: str, folder: Path, experts: int, limit: float) -> dict[str, float]:
    """The same in a process of its own; fails if the limit is too small."""
    command = [sys.executable, "-m", "benchmarks.memory", "--worker", method]
    command += ["--folder", str(folder), "--experts", str(experts), "--limit", str(limit)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise MemoryError(f"{method} failed under {limit} GB: {done.stderr[-500:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--limit", type=float, default=1.5, help="GB of anonymous memory")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--height", type=int, default=4096, help="rows of a matrix")
    parser.add_argument("--width", type=int, default=256, help="columns of a matrix")
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--output", type=Path, default=Path("docs/results/methods_memory.md"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(merge(options.worker, options.folder, options.experts, options.limit)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        write_models(Path(name), options.gigabytes, (options.height, options.width))
        lines = [
            "# Memory of a merge from files to files",
            f"Made by `python -m benchmarks.memory {' '.join(sys.argv[1:])}".rstrip() + "`.",
            f"{options.experts} experts of {options.gigabytes:g} GB in float32, matrices of "
            f"{options.height} x {options.width}, one thread; a process that passes "
            f"{options.limit:g} GB of anonymous memory (PyTorch itself takes about 0.2) is ended.",
            "| method | seconds | anonymous memory, GB |\n| --- | ---: | ---: |",
        ]
        for method in options.methods.split(","):
            found = run(method, Path(name), options.experts, options.limit)
            lines[-1] += f"\n| {method} | {found['seconds']:.0f} | {found['anonymous_gb']:.2f} |"
            print(lines[-1].splitlines()[-1], flush=True)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
