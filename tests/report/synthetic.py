"""Sweeps that look like the real thing, from a formula: no model behind them."""

import itertools

import torch

from lightning_merge.pareto import (
    SweepResult,
    das_dennis,
    equal,
    one_hot,
    pairwise,
    priority,
    response,
)
from lightning_merge.report import build_live

GLYPHS = ("latin", "greek", "cyrillic", "armenian", "georgian", "hebrew", "arabic", "math")


def make_grid(num_tasks, points=7):
    """Equal, priority, one-hot, every edge, every response path, and a lattice."""
    parts = [("equal", None, equal(num_tasks))]
    for task in range(num_tasks):
        parts.append(("priority", task, priority(num_tasks, task)))
        parts.append(("one_hot", task, one_hot(num_tasks, task)))
        parts.append(("response", task, response(num_tasks, task, points)))
    for first, second in itertools.combinations(range(num_tasks), 2):
        parts.append(("pairwise", None, pairwise(num_tasks, first, second, points)))
    parts.append(("lattice", None, das_dennis(num_tasks, 12 if num_tasks == 3 else 2)))
    kinds = [kind for kind, _, grid in parts for _ in grid]
    favoured = [task for _, task, grid in parts for _ in grid]
    return torch.cat([grid for _, _, grid in parts]), kinds, favoured


def make_sweep(num_tasks=8, seed=0, points=7, names=None, **changes):
    """Experts near .93, uncorrected .73, equal .82, one-hot .92, with noise and quarrels."""
    draw = torch.Generator().manual_seed(seed)
    tasks = names or (GLYPHS if num_tasks <= 8 else [f"task_{i:02d}" for i in range(num_tasks)])
    tasks = tuple(tasks)[:num_tasks]
    grid, kinds, favoured = make_grid(num_tasks, points)
    experts = 0.93 + 0.05 * (torch.rand(num_tasks, generator=draw) - 0.5)
    uncorrected = experts - 0.20 + 0.12 * (torch.rand(num_tasks, generator=draw) - 0.5)
    base = 0.25 + 0.2 * torch.rand(num_tasks, generator=draw)
    worst = uncorrected - 0.02 - 0.2 * torch.rand(num_tasks, generator=draw)
    noise = 0.004 * torch.randn(grid.shape, generator=draw)
    pull = grid / (grid + 0.06)
    raw = (worst + (experts - 0.005 - worst) * pull * 1.06 + noise).clamp(0, 1)
    diagnostics = {
        task: {
            "beta_relative": 0.01 * (1 + i),
            "r2": 0.9 - 0.03 * i,
            "share_at_equal": 1 / num_tasks,
            "rank": 192,
            "condition": 5123.0 + i,
            "samples": 2000,
        }
        for i, task in enumerate(tasks)
    }
    facts = {
        "tasks": tasks,
        "metric": "accuracy",
        "preferences": grid,
        "kinds": tuple(kinds),
        "favoured": tuple(None if task is None else tasks[task] for task in favoured),
        "raw": raw,
        "references": {"experts": experts, "base": base, "uncorrected": uncorrected},
        "method": "TaskArithmetic(scale=0.3)",
        "timings": {"fit": 61.2, "merge": 3.4, "calibrate": 9.1, "sweep": 8.8, "report": 2.0},
        "versions": {"lightning-merge": "0.1.0", "torch": "2.6.0", "lightning": "2.6.0"},
        "diagnostics": diagnostics,
    }
    return SweepResult(**(facts | changes))


def make_live(num_tasks=8, width=12, classes=5, samples=40, seed=0, samples_per_task=None):
    """Experts whose features are each another linear map of the merged features."""
    draw = torch.Generator().manual_seed(seed)
    tasks = make_sweep(num_tasks).tasks

    def normal_numbers(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    heads, normal, tests = {}, {}, {}
    for index, task in enumerate(tasks):
        rows = classes + index % 3  # heads of different sizes
        head, shift = normal_numbers(rows, width) / width**0.5, 0.1 * normal_numbers(rows)
        distortion = torch.eye(width, dtype=torch.float64) + 0.7 * normal_numbers(width, width) / (
            width**0.5
        )
        merged = normal_numbers(samples + width, width)
        expert = merged @ distortion.T
        scale = 1 / expert.square().sum()
        ridge = 1e-2 * torch.eye(width, dtype=torch.float64)
        normal[task] = (scale * (expert.T @ merged + ridge), scale * (merged.T @ merged + ridge))
        heads[task] = (head, shift)
        labels = (expert @ head.T + shift).argmax(dim=1)
        tests[task] = (merged[:samples].float(), labels[:samples])
    return build_live(heads, normal, tests, samples_per_task=samples_per_task)
