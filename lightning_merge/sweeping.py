"""Sweeps: every preference of a grid, beside the experts, the base and the uncorrected merge."""

import importlib.metadata
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_merge.evaluation import Loader, Scores, evaluate, measure, sweep_task
from lightning_merge.merged import MergedModel
from lightning_merge.networks import load_backbone, plain_copy, set_submodule
from lightning_merge.pareto import (
    SweepResult,
    das_dennis,
    equal,
    one_hot,
    pairwise,
    priority,
    response,
)
from lightning_merge.pool import FIT_SECONDS, ExpertPool
from lightning_merge.runtime import Runtime
from lightning_merge.scoring import ACCURACY, direction, title
from lightning_merge.sources import Experts
from lightning_merge.states import StateDict

LATTICE_POINTS = 150
"""Most points of the lattice that is chosen by itself."""


@dataclass(frozen=True, kw_only=True)
class PreferenceGrid:
    """Which preferences a sweep evaluates; equal and one-hot preferences are always among them."""

    priority: float = 0.5
    """Weight of the favoured task in priority preferences; the others share the rest."""
    pairwise: int = 11
    """Points on the edge between each two tasks; 0 for none."""
    response: int = 11
    """Points on the path of each task's weight from 0 to 1; 0 for none."""
    lattice: int | None = None
    """Divisions of the lattice over all tasks; 0 for none, by default up to 150 points."""
    max_pairs: int = 45
    """Pairs beyond this many are left out of the pairwise fronts (ten tasks have 45)."""

    def __post_init__(self) -> None:
        if not 0 < self.priority <= 1:
            raise ValueError(f"priority must be above 0 and at most 1, found {self.priority}.")
        for name in ("pairwise", "response", "lattice"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name)}.")

    def points(
        self, tasks: tuple[str, ...]
    ) -> tuple[Tensor, tuple[str, ...], tuple[str | None, ...]]:
        """Preferences ``(P, T)``, what each is for, and the task that it favours, if one."""
        count = len(tasks)
        parts: list[tuple[str, str | None, Tensor]] = [("equal", None, equal(count))]
        for index, task in enumerate(tasks):
            parts.append(("one_hot", task, one_hot(count, index)))
            parts.append(("priority", task, priority(count, index, weight=self.priority)))
            if self.response > 1:
                parts.append(("response", task, response(count, index, self.response)))
        if self.pairwise > 1:
            pairs = itertools.islice(itertools.combinations(range(count), 2), self.max_pairs)
            parts += [("pairwise", None, pairwise(count, *pair, self.pairwise)) for pair in pairs]
        divisions = _divisions(count) if self.lattice is None else self.lattice
        if divisions:
            parts.append(("lattice", None, das_dennis(count, divisions)))
        kinds = [kind for kind, _, rows in parts for _ in range(len(rows))]
        favoured = [task for _, task, rows in parts for _ in range(len(rows))]
        return torch.cat([rows for _, _, rows in parts]), tuple(kinds), tuple(favoured)


def sweep_model(
    model: MergedModel,
    experts: Experts,
    test_set: Callable[[str], Loader],
    grid: PreferenceGrid,
    runtime: Runtime,
    *,
    keep: int = 0,
    metrics: Mapping[str, Metric] | None = None,
) -> tuple[SweepResult, dict[str, Scores]]:
    """Evaluate a merged model under all preferences of a grid, and its references.

    Each test set runs once through the merged backbone, whatever the number of preferences, once
    through its expert and once through the base; every process runs its share of the batches.

    Args:
        model: The merged model.
        experts: The pool that it was merged from: experts and base.
        test_set: Batches of a task's test set; of this process alone.
        grid: The preferences.
        runtime: This process's place among others.
        keep: Samples of each task whose representation is returned with the scores.
        metrics: What is measured on each task, of (outputs, targets); by default the accuracy.

    Returns:
        The result, the same on every process, and the scores of each task.
    """
    tasks = tuple(model.tasks)
    preferences, kinds, favoured = grid.points(tasks)
    network = plain_copy(model.network)
    timings = {f"sweep_{name}": 0.0 for name in ("merged", "experts", "base")}
    scores: dict[str, Scores] = {}
    rows: dict[str, list[float]] = {"experts": [], "base": [], "uncorrected": []}

    def reference(task: str, row: str, state: StateDict) -> None:
        start = time.perf_counter()
        plain, text = filled(network, model, task, state), f"{task}: {row}"
        if metrics is None:
            correct, samples = evaluate(plain, test_set(task), runtime, text)
            rows[row].append(correct / samples)
        else:
            rows[row].append(measure(plain, test_set(task), runtime, text, metrics[task]))
        timings[f"sweep_{row}"] += time.perf_counter() - start

    higher_is_better = direction(metrics or {})
    start = time.perf_counter()
    different, places = preferences.unique(dim=0, return_inverse=True)
    chunks = list(model.correction.fold_heads(different, model.linear_heads()))
    timings["solve"] = time.perf_counter() - start
    for task in tasks:
        start = time.perf_counter()
        weights, biases = (
            torch.cat(part) for part in zip(*(heads[task] for heads in chunks), strict=True)
        )
        found = sweep_task(
            model,
            task,
            different,
            test_set(task),
            runtime,
            folded=(weights, biases),
            metric=None if metrics is None else metrics[task],
            keep=keep,
        )
        scores[task] = _placed(found, places)
        timings["sweep_merged"] += time.perf_counter() - start
        rows["uncorrected"].append(scores[task].uncorrected_value)
        reference(task, "experts", experts.expert(task))
        reference(task, "base", experts.base)
    result = assembled(
        model,
        experts,
        (preferences, kinds, favoured),
        torch.stack([scores[task].values for task in tasks], dim=1),
        rows,
        metric=title(metrics) if metrics else ACCURACY,
        higher_is_better=higher_is_better,
        timings=timings,
    )
    return result, scores


def assembled(
    model: MergedModel,
    experts: Experts,
    points: tuple[Tensor, tuple[str, ...], tuple[str | None, ...]],
    raw: Tensor,
    rows: Mapping[str, list[float]],
    *,
    metric: str,
    higher_is_better: bool,
    timings: Mapping[str, float],
) -> SweepResult:
    """The result of a sweep from its points, metrics ``(P, T)`` and reference rows."""
    preferences, kinds, favoured = points
    tasks = tuple(model.tasks)
    return SweepResult(
        tasks=tasks,
        metric=metric,
        higher_is_better=higher_is_better,
        preferences=preferences,
        kinds=kinds,
        favoured=favoured,
        raw=raw,
        references={name: torch.tensor(row, dtype=torch.float64) for name, row in rows.items()}
        | {"per_task": _own_corners(tasks, kinds, favoured, raw)},
        method=_method_name(model),
        diagnostics=model.correction.report(),
        timings={**_fit_seconds(experts), **model.record.get("timings", {}), **timings},
        versions={
            name: importlib.metadata.version(name)
            for name in ("lightning-merge", "lightning", "torch", "timm")
        },
    )


def filled(network: nn.Module, model: MergedModel, task: str, state: StateDict) -> nn.Module:
    """A network, changed in place, with a backbone's state and the head of a task's expert."""
    load_backbone(network.cpu(), state, model.head)
    set_submodule(network, model.head, plain_copy(model.heads[task]))
    return network


def _placed(scores: Scores, places: Tensor) -> Scores:
    """Scores of different preferences at every place of a grid that has them."""
    measured = scores.measured
    if measured is not None:
        measured = torch.cat([measured[:-1][places], measured[-1:]])
    return replace(scores, correct=scores.correct[places], measured=measured)


def _own_corners(
    tasks: tuple[str, ...],
    kinds: tuple[str, ...],
    favoured: tuple[str | None, ...],
    raw: Tensor,
) -> Tensor:
    # A head folded with its own task's map is the head at that task's corner.
    marks = list(zip(kinds, favoured, strict=True))
    own = [raw[marks.index(("one_hot", task)), i] for i, task in enumerate(tasks)]
    return torch.stack(own)


def _fit_seconds(experts: Experts) -> dict[str, float]:
    if not isinstance(experts, ExpertPool):
        return {}
    seconds = [experts.scores(task).get(FIT_SECONDS) for task in experts.tasks]
    known = [value for value in seconds if value is not None]
    return {"fit": sum(known)} if known else {}


def _divisions(count: int) -> int:
    divisions = 1
    while math.comb(divisions + count, count - 1) <= LATTICE_POINTS:
        divisions += 1
    return divisions


def _method_name(model: MergedModel) -> str:
    method = model.record.get("method", {})
    return str(method.get("class_path", "unknown")).rpartition(".")[2]
