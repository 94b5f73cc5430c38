"""Ours against a plain torch prototype and whichever peers are installed, in turns.

python -m benchmarks.compare [--quick] [--only average,ties] [--rounds 3] [--device cpu]

Every contender of a row runs in a process of its own, one at a time, so that one which fails, takes
too long or eats the memory is reported with the reason and the others go on. Of every row: medians,
the median of the ratios to ours within a round, the growth of anonymous memory, and the largest
difference of the result. Writes docs/results/methods_speed.md after every row.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file

from benchmarks import peers
from benchmarks.contender import contender
from benchmarks.models import experts_near_base

RESULT = Path("docs/results/methods_speed.md")


@dataclass(frozen=True)
class Row:
    """One line of the table: ``blocks`` of 12, in ``threads`` (0: as the machine has)."""

    title: str
    method: str
    blocks: int
    threads: int = 0
    peers: bool = True
    rounds: int | None = None


ROWS = {
    "average": Row("average, in memory", "average", 12, rounds=9),
    "task_arithmetic": Row("task arithmetic, in memory", "task_arithmetic", 12, rounds=9),
    "linear": Row("linear merge, file to file", "linear", 12, rounds=9),
    "ties": Row("TIES top 20 %, 2 of 12 blocks", "ties", 2),
    "dare_ties": Row("DARE-TIES, 2 blocks", "dare_ties", 2),
    "tsv": Row("TSV-M, 2 blocks", "tsv", 2),
    "iso_c": Row("Iso-C, 2 blocks", "iso_c", 2),
    "iso_cts": Row("Iso-CTS, 2 blocks", "iso_cts", 2),
    # the peers need 20 GiB, or minutes, for these
    "ties_whole": Row("TIES, whole model, 1 thread", "ties", 12, 1, peers=False, rounds=1),
    "tsv_whole": Row("TSV-M, whole model, 1 thread", "tsv", 12, 1, peers=False, rounds=1),
}
QUICK = ("ties", "dare_ties", "tsv", "iso_c", "iso_cts")


class ContenderError(Exception):
    """Why a contender gives no figure."""


@dataclass
class Runner:
    """The process of one contender, and what it has answered."""

    process: subprocess.Popen[str]
    walls: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    growth: float = 0.0
    difference: float = math.nan
    off: float = math.nan
    failure: str = ""

    def answer(self, seconds: float) -> dict[str, float]:
        """The next line it prints, or the reason why there is none."""
        selector, end = selectors.DefaultSelector(), time.monotonic() + seconds
        selector.register(self.process.stdout, selectors.EVENT_READ)
        before = anonymous(self.process.pid)
        while not selector.select(0.01):
            self.growth = max(self.growth, anonymous(self.process.pid) - before)
            if time.monotonic() > end:
                self.process.kill()
                raise ContenderError(f"over {seconds:g} s")
        line = self.process.stdout.readline()
        if not line:
            last = (self.process.stderr.read() or "").strip().splitlines()[-1:]
            raise ContenderError((last or [f"ended with code {self.process.wait()}"])[0][:90])
        return json.loads(line)

    def turn(self, seconds: float) -> None:
        """One merge."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found = self.answer(seconds)
        self.walls.append(found["wall"])
        self.cpus.append(found["cpu"])
        growth, compared = self.growth, self.answer(120)
        self.difference, self.off = compared["difference"], compared["off"]
        self.growth = growth  # the comparison is not part of the merge


def anonymous(pid: int) -> float:
    """GiB of a process that no file backs; 0 if it has ended."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next((int(x.split()[1]) / 2**20 for x in lines if x.startswith("RssAnon")), 0.0)
    return 0.0


def write_models(folder: Path, options: argparse.Namespace, blocks: int) -> None:
    base, experts = experts_near_base(options.experts, blocks)
    save_file(base, folder / "base.safetensors")
    for t, task in enumerate(list(experts)):
        save_file(experts.pop(task), folder / f"{t}.safetensors")


def started(name: str, row: Row, folder: Path, options: argparse.Namespace) -> Runner:
    command = [sys.executable, "-m", "benchmarks.contender", name, row.method]
    command += ["--folder", str(folder), "--experts", str(options.experts)]
    command += ["--device", options.device, "--threads", str(row.threads or options.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(row.threads or options.threads)}
    log = (folder / f"{name}.log").open("w+")
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment
    )
    process.stderr = log
    return Runner(process)


def compare(key: str, folder: Path, options: argparse.Namespace) -> list[list[str]]:
    row = ROWS[key]
    names = ["ours", "prototype", *(peers.installed() if row.peers else [])]
    runners: dict[str, Runner] = {}
    try:
        for name in names:
            runner = started(name, row, folder, options)
            runners[name] = runner
            try:
                if runner.answer(options.limit).get("absent"):
                    del runners[name]
            except ContenderError as error:
                runner.failure = str(error)
        for runner in runners.values():
            runner.growth = 0.0
        turns = list(runners.values())
        for _ in range(row.rounds or options.rounds):
            for runner in turns:
                take_turn(runner, options.limit)
            turns = [*turns[1:], turns[0]]  # nobody always comes after the same one
        return [line(row, name, runner, runners["ours"]) for name, runner in runners.items()]
    finally:
        for runner in runners.values():
            runner.process.kill()
            runner.process.wait()


def take_turn(runner: Runner, seconds: float) -> None:
    if runner.failure:
        return
    try:
        runner.turn(seconds)
    except (ContenderError, OSError) as error:
        runner.failure = str(error)


def line(row: Row, name: str, runner: Runner, ours: Runner) -> list[str]:
    label = row.title if name == "ours" else ""
    if not runner.walls:
        cells = [label, name, runner.failure, "", "", "", "", ""]
    else:
        ratios = [a / b for a, b in zip(runner.walls, ours.walls, strict=False)]
        cells = [
            label,
            name,
            f"{statistics.median(runner.walls):.2f}",
            f"{statistics.median(runner.cpus):.2f}",
            f"{statistics.median(ratios):.2f}" if ratios else "-",
            f"{runner.growth:.2f}",
            f"{runner.difference:.0e}",
            f"{runner.off:.0e}",
        ]
    print("  ".join(cells), flush=True)
    return cells


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
    for who in ("ours", "prototype", *peers.installed()):
        try:
            # peers talk
            with contextlib.redirect_stdout(sys.stderr):
                if (run := contender(who, "tsv")) is None:
                    continue
                # in float64 the sum with the base does not round away what is compared
                wide = {n: v.double() for n, v in base.items()} if who == "ours" else base
                update = run(wide, experts)[name].double() - base[name].double()
            lines.append([who, f"{float((update - exact).norm() / exact.norm()):.0e}"])
        except Exception as error:  # (a peer may fail in any way)
            lines.append([who, f"{type(error).__name__}: {error}"[:90]])
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
    parser.add_argument("--limit", type=float, default=240, help="seconds a merge may take")
    parser.add_argument("--quick", action="store_true", help="only the rows of two blocks")
    parser.add_argument("--only", default="")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the models are written")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    keys = options.only.split(",") if options.only else QUICK if options.quick else tuple(ROWS)
    where = (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{options.threads} threads, load {os.getloadavg()[0]:.1f}; Python "
        f"{platform.python_version()}, {versions()}."
    )
    print(where)
    sections = [
        "# Speed and memory of the weight-space methods",
        f"Made by `python -m benchmarks.compare {' '.join(sys.argv[1:])}".rstrip() + "`.",
        f"{where} {options.experts} experts of ViT-B/32 shapes in float32, {options.rounds} rounds "
        "in turns (one of the rows of whole models); `x ours` is the median of the ratios within "
        "a round, and values above 1 are slower than ours. `difference` is the largest from ours, "
        "`off` the share of entries that differ by more than 1e-6: TIES chooses, and entries that "
        "tie for the last place or whose task vectors cancel within rounding may be chosen "
        "otherwise; mergekit trims each parameter by itself; DARE's draws are everyone's own.",
    ]
    rows: list[list[str]] = []
    header = ["row", "contender", "median s", "CPU s", "x ours", "+GiB", "difference", "off"]
    for blocks in sorted({min(ROWS[key].blocks, options.blocks) for key in keys}):
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            write_models(Path(name), options, blocks)
            for key in keys:
                if min(ROWS[key].blocks, options.blocks) == blocks:
                    rows += compare(key, Path(name), options)
                    write(options.output, [*sections, table(header, rows)])
    sections += [table(header, rows), table(["import", "CPU s"], start_up())]
    if "tsv" in keys:
        sections.append("Relative error of TSV-M against float64 singular value decompositions:")
        sections.append(table(["contender", "error"], accuracy()))
    if missing := [name for name in peers.MODULES if name not in peers.installed()]:
        sections.append(f"Not installed: {', '.join(missing)}.")
    write(options.output, sections)
    print("\n\n".join(sections))


def write(path: Path, sections: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
