"""Results as Markdown: what was run, where, and the tables."""

import gc
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, get_origin, get_type_hints

import torch
from jsonargparse import auto_cli

Result = TypeVar("Result")

RESULTS = Path("docs/results")


def write(
    name: str,
    title: str,
    seeds: Sequence[int],
    sections: Sequence[str],
    output: str | None = None,
) -> Path:
    """Write ``docs/results/OUTPUT.md`` (by default NAME), the command and the versions on top.

    Without seeds it is a measurement of time: threads are those in use.
    """
    packages = ("lightning-merge", "torch", "timm", "scikit-learn")
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
    seeded = f"; seeds {', '.join(map(str, seeds))}" if seeds else ""
    threads = torch.get_num_threads()
    used = f"one thread each for training and measuring ({threads} in use)"
    header = [
        f"# {title}",
        f"Made by `{command(name)}`{seeded}.",
        f"{versions}; Python {platform.python_version()}. {hardware()}, "
        f"{used if seeds else f'{threads} threads'}.",
    ]
    path = RESULTS / f"{output or name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join([*header, *sections]) + "\n", encoding="utf-8")
    return path


def command(name: str) -> str:
    """The command that was given."""
    return " ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]])


def run(main: Callable[..., None]) -> None:
    """Run a function as a command, whose lists may also be given as in ``--seeds 0 1 2``."""
    lists = [f"--{n}" for n, kind in get_type_hints(main).items() if get_origin(kind) is list]
    words: list[str] = []
    values: list[str] = []
    for word in [*sys.argv[1:], "--"]:
        if values and word.startswith("--"):
            plain = [int(value) if value.isdigit() else value for value in values]
            words.append(f"{words.pop()}={json.dumps(plain)}")
            values = []
        if words and words[-1] in lists and not word.startswith(("--", "[")):
            values.append(word)
        else:
            words.append(word)
    auto_cli(main, args=words[:-1])


def hardware() -> str:
    """Processor and operating system."""
    found = [
        line.partition(":")[2].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    return f"{found[0] if found else platform.machine()} ({platform.system()})"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; text to the left, the rest to the right."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    aligned = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [lines[0], aligned, *lines[1:]])


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over the seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def spent(function: Callable[[], Result]) -> tuple[Result, float, float]:
    """Call a function: its result, CPU seconds of this process, and growth of memory in MiB.

    The growth is that of the peak over what is in use before; on Linux alone, NaN elsewhere.
    """
    gc.collect()
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # the peak so far becomes what is in use now
    before = _memory("VmRSS")
    start = time.process_time()
    result = function()
    seconds = time.process_time() - start
    return result, seconds, _memory("VmHWM") - before


def _memory(kind: str) -> float:
    found = [line.split()[1] for line in _lines(Path("/proc/self/status")) if kind in line]
    return float(found[0]) / 1024 if found else float("nan")


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
