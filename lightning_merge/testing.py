"""A sweep through the project's own ``test_step``: its batches, its metrics, its rules."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_merge.merged import MergedModel
from lightning_merge.networks import (
    get_submodule,
    load_backbone,
    named_state,
    plain_copy,
    set_submodule,
    split_state,
)
from lightning_merge.pareto import SweepResult
from lightning_merge.sources import Experts
from lightning_merge.states import StateDict
from lightning_merge.sweeping import PreferenceGrid, assembled, filled


@dataclass(kw_only=True)
class Client:
    """A task's own LightningModule and data, where one pair does not serve all tasks."""

    model: LightningModule | None = None
    """The module whose ``test_step`` judges the task; by default the sweep's model."""
    data: LightningDataModule | None = None
    """Its data; by default the sweep's, told the task."""
    metric: str | None = None
    """Name under which its metric is logged; by default the sweep's."""


@dataclass(frozen=True, kw_only=True)
class TestSteps:
    """Which modules, data and logged metrics judge the tasks of a sweep."""

    model: LightningModule | None
    data: LightningDataModule | None
    clients: Mapping[str, Client]
    metric: str | None
    mode: Literal["max", "min"]
    network: str | None = None

    def metric_of(self, task: str) -> str:
        """Name of a task's metric.

        Raises:
            ValueError: If none is given.
        """
        name = self.client(task).metric or self.metric
        if name is None:
            raise ValueError(
                f"via='test_step' needs the name of a logged metric for '{task}': give --metric "
                "NAME and --mode max or min."
            )
        return name

    def client(self, task: str) -> Client:
        """What a task has of its own."""
        return self.clients.get(task, Client())

    def module_of(self, task: str) -> LightningModule:
        """The task's module: its own, or the shared one."""
        module = self.client(task).model or self.model
        if module is None:
            raise ValueError(
                f"via='test_step' needs the LightningModule of '{task}': give --model, or a client "
                "with one."
            )
        return module

    def source_of(self, task: str) -> dict[str, Any]:
        """Arguments of ``Trainer.test`` that give the task's test set."""
        own = self.client(task).data
        if own is not None:
            return {"datamodule": own}
        data: Any = self.data
        if hasattr(data, "task"):
            data.task = task
            return {"datamodule": data}
        if hasattr(data, "test_dataset") and hasattr(data, "dataloader"):
            return {"dataloaders": data.dataloader(data.test_dataset(task))}
        raise ValueError(
            f"via='test_step' does not know the test set of '{task}': give a datamodule with a "
            "'task' that can be set or a test_dataset(task), or a client with data of its own."
        )


def sweep_test_steps(
    trainer: Trainer, model: MergedModel, experts: Experts, grid: PreferenceGrid, steps: TestSteps
) -> SweepResult:
    """Run ``trainer.test`` for every preference and task, with the tailored weights in the module.

    Nothing is shared between preferences, so this takes as many passes as there are preferences:
    the fast sweep is for large grids, this one for metrics and batches that only the project knows.

    Args:
        trainer: Runs the tests under its own strategy, as always.
        model: The merged model.
        experts: The pool that it was merged from.
        grid: The preferences.
        steps: The modules, data and metrics.

    Raises:
        ValueError: If a module does not hold the network, or does not log the metric.
    """
    tasks = tuple(model.tasks)
    if unknown := sorted(set(steps.clients) - set(tasks)):
        raise ValueError(f"clients of unknown tasks {unknown}; the model has {', '.join(tasks)}.")
    names = {task: steps.metric_of(task) for task in tasks}
    points = grid.points(tasks)
    different, places = points[0].unique(dim=0, return_inverse=True)
    timings = {f"sweep_{name}": 0.0 for name in ("merged", "experts", "base")}
    columns, rows = [], {name: list[float]() for name in ("experts", "base", "uncorrected")}
    for task in tasks:
        judge = _judge(trainer, steps, task, model)
        start = time.perf_counter()
        scores = [judge(model.with_preference(p, task)) for p in different]
        columns.append(torch.tensor(scores, dtype=torch.float64)[places])
        rows["uncorrected"].append(judge(model.uncorrected(task)))
        timings["sweep_merged"] += time.perf_counter() - start
        references: dict[str, StateDict] = {"experts": experts.expert(task), "base": experts.base}
        for row, state in references.items():
            start = time.perf_counter()
            rows[row].append(judge(filled(plain_copy(model.network), model, task, state)))
            timings[f"sweep_{row}"] += time.perf_counter() - start
    return assembled(
        model,
        experts,
        points,
        torch.stack(columns, dim=1),
        rows,
        metric=", ".join(dict.fromkeys(names.values())),
        higher_is_better=steps.mode == "max",
        timings=timings,
    )


def _judge(
    trainer: Trainer, steps: TestSteps, task: str, model: MergedModel
) -> Callable[[nn.Module], float]:
    module, name = steps.module_of(task), steps.metric_of(task)

    def judge(network: nn.Module) -> float:
        install = _Install(network, model.head, steps.network)
        trainer.callbacks.append(install)  # type: ignore[attr-defined]
        try:
            # A copy each time: setup and configure_model are written to be called once.
            trainer.test(copy.deepcopy(module), **steps.source_of(task), verbose=False)
        finally:
            trainer.callbacks.remove(install)  # type: ignore[attr-defined]
        logged = trainer.callback_metrics
        if name not in logged:
            raise ValueError(
                f"the test_step of '{task}' ({type(module).__name__}) does not log '{name}'; it "
                f"logs {', '.join(sorted(logged)) or 'nothing'}. Give one of these as the metric."
            )
        return float(logged[name])

    return judge


class _Install(Callback):
    """Puts weights into the module when a test begins: after its setup and configure_model."""

    def __init__(self, network: nn.Module, head: str, path: str | None) -> None:
        self._network, self._head, self._path = network, head, path

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        backbone, _ = split_state(self._network, self._head)
        path = self._path
        if path is None:
            path = path_of_network(pl_module, set(backbone), self._head)
        live = get_submodule(pl_module, path)
        load_backbone(live, backbone, self._head)
        head = plain_copy(get_submodule(self._network, self._head)).to(pl_module.device)
        set_submodule(live, self._head, head.eval())


def path_of_network(module: nn.Module, names: set[str], head: str) -> str:
    """Dotted path of the one part of a module that has a backbone's names and a head.

    Raises:
        ValueError: If no part has them, or several have.
    """
    found: dict[int, str] = {}
    for path, part in module.named_modules(remove_duplicate=True):
        own = set(named_state(part))
        if names <= own and any(name.startswith(f"{head}.") for name in own):
            inner = get_submodule(part, "")
            clean = ".".join(piece for piece in path.split(".") if piece != "_orig_mod")
            found.setdefault(id(inner), clean)
    paths = list(found.values())
    if len(paths) != 1:
        what = f"several parts ({', '.join(paths)})" if paths else "no part"
        raise ValueError(
            f"{what} of {type(module).__name__} have the backbone's {len(names)} tensors (such as "
            f"'{min(names)}') and a head '{head}'. Give the module that was fine-tuned, and with "
            "--network the dotted path of the network in it."
        )
    return paths[0]
