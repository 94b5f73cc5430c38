"""What every process of a Trainer does in a stage: merge, diagnose, sweep; and what it writes."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.console import Console
from torch import nn
from torch.utils.data import Dataset
from torchmetrics import Metric

from lightning_merge.diagnosing import diagnose_experts
from lightning_merge.evaluation import Scores
from lightning_merge.hooks import through_hooks
from lightning_merge.loading import load_merged, network_within, pool_of
from lightning_merge.logging import log_sweep
from lightning_merge.merged import MergedModel
from lightning_merge.merged_folder import record_scores
from lightning_merge.merging import Correction, merge_experts
from lightning_merge.methods import ExpertStore, MergeMethod, WeightMethod
from lightning_merge.methods.buffers import knowing_buffers
from lightning_merge.networks import floating_buffers
from lightning_merge.pareto import SweepResult
from lightning_merge.pool import ExpertPool
from lightning_merge.report import (
    LiveModel,
    build_live,
    console_table,
    merge_pictures,
    plan_text,
    write_report,
)
from lightning_merge.report.diagnosis_figure import write_diagnosis_picture
from lightning_merge.scoring import declared
from lightning_merge.selecting import corrections_with, select_from, select_merge
from lightning_merge.sources import chosen_tasks
from lightning_merge.states import StateDict
from lightning_merge.strategies import on_first, runtime_of, sharded
from lightning_merge.sweeping import PreferenceGrid, sweep_model
from lightning_merge.testing import TestSteps, sweep_test_steps

LIVE_SAMPLES = 200
"""Test samples of each task that the report's sliders are evaluated on, exactly."""


@runtime_checkable
class TestSets(Protocol):
    """What a sweep asks of a datamodule."""

    def test_dataset(self, task: str) -> Dataset[Any]:
        """Labelled test samples of one task."""

    def dataloader(self, dataset: Dataset[Any]) -> Iterable[Any]:
        """Batches of a dataset, in order."""


def merge(
    trainer: Trainer,
    model: LightningModule | None,
    pool: str,
    output: str,
    method: MergeMethod,
    correction: Correction,
    select: bool | list[MergeMethod],
    shard_size: int,
    shared: dict[str, Any],
) -> None:
    """Merge, or select; the first process writes the model. See ``MergeTrainer.merge``."""
    experts = ExpertPool.open(pool)
    network = network_within(model, experts.base, experts.head)
    if select is not False:
        selection = select_merge(
            experts,
            select_from(select, method, len(shared["tasks"] or experts.tasks)),
            corrections=corrections_with(correction),
            module=network,
            runtime=runtime_of(trainer),
            **shared,
        )
        trainer.print(selection.summary())
        merged = selection.model
    else:
        merged = merge_experts(
            experts,
            method,
            correction=correction,
            module=network,
            runtime=runtime_of(trainer),
            **shared,
        )
    on_first(
        trainer,
        lambda: merged.save(
            output,
            shard_size=shard_size,
            pictures=merge_pictures(merged.report, merged.files),
        ),
    )
    facts = merged.correction.report() if merged.statistics else {}
    figures = {f"merge/r2/{task}": found["r2"] for task, found in facts.items()}
    for logger in trainer.loggers:
        logger.log_metrics(figures | merged.record["timings"], step=0)
        logger.save()
    trainer.print(f"wrote {output}")


def dry_run(
    trainer: Trainer,
    pool: str,
    method: MergeMethod,
    tasks: list[str] | None,
    select: bool | list[MergeMethod],
) -> None:
    """Print what each parameter would get."""
    experts, states, buffers = _chosen(pool, tasks)
    tried = [method] if select is False else select_from(select, method, len(states))
    tried = [knowing_buffers(one, buffers) for one in tried]
    trainer.print("\n\n".join(plan_text(one, experts.base, states) for one in tried))


def _chosen(
    pool: str, tasks: list[str] | None
) -> tuple[ExpertPool, dict[str, StateDict], list[str]]:
    """A pool, the weights of the tasks chosen, and the names of its network's floating buffers."""
    experts = ExpertPool.open(pool)
    states = {task: experts.expert(task) for task in chosen_tasks(experts, tasks)}
    buffers = floating_buffers(experts.network(), experts.base) if experts.model else []
    return experts, dict(states), buffers


def compress(
    trainer: Trainer, pool: str, output: str, method: ExpertStore, tasks: list[str] | None
) -> None:
    """Write the experts into one file, and tell how near each comes when it is rebuilt."""
    experts, states, buffers = _chosen(pool, tasks)
    store = knowing_buffers(method, buffers).save(output, experts.base, states)
    for task, expert in states.items():
        error = store.error(task, experts.base, expert)
        trainer.print(f"{task}: rebuilt with an error of {error:.3g}, where the base has 1")
    size = Path(output).stat().st_size / experts.base.path.stat().st_size
    trainer.print(f"wrote {output}: {len(states)} experts in {size:.3g} times the base's size")


def diagnose(
    trainer: Trainer,
    model: LightningModule | None,
    pool: str,
    output: str,
    heuristics: list[WeightMethod] | None,
    tasks: list[str] | None,
    num_folds: int,
    tokens_per_sample: int | None,
    num_samples: int | None,
    batch_size: int,
) -> None:
    """Diagnose; the first process writes the results. See ``MergeTrainer.diagnose``."""
    experts = ExpertPool.open(pool)
    diagnosis = diagnose_experts(
        experts,
        heuristics=heuristics or (),
        num_folds=num_folds,
        tokens_per_sample=tokens_per_sample,
        num_samples=num_samples,
        module=network_within(model, experts.base, experts.head),
        tasks=tasks,
        batch_size=batch_size,
        runtime=runtime_of(trainer),
    )

    def write() -> None:
        paths = [*diagnosis.save(output), write_diagnosis_picture(diagnosis, output)]
        for line in [*diagnosis.recommendation(), *paths]:
            trainer.print(line)

    on_first(trainer, write)


def sweep(
    trainer: Trainer,
    model: LightningModule | None,
    datamodule: LightningDataModule | None,
    merged: str,
    output: str,
    pool: str | None,
    grid: PreferenceGrid,
    metrics: dict[str, Metric] | None,
) -> None:
    """Evaluate every preference in one pass of each test set. See ``MergeTrainer.sweep``."""
    if not isinstance(datamodule, TestSets):
        raise ValueError(
            "sweep needs the tasks' test sets: a datamodule with test_dataset(task) and "
            "dataloader(dataset), such as lightning_merge.data.TaskSuite (--data ...)."
        )
    suite: TestSets = datamodule
    runtime = runtime_of(trainer)
    prepare_data(trainer, datamodule)
    steerable = load_merged(merged, model)
    chosen = declared(datamodule, steerable.tasks, metrics)
    result, scores = sweep_model(
        steerable,
        pool_of(merged, steerable, pool),
        lambda task: through_hooks(
            sharded(suite.dataloader(suite.test_dataset(task)), runtime), datamodule
        ),
        grid,
        runtime,
        keep=0 if chosen else LIVE_SAMPLES,
        metrics=chosen,
    )
    # Built on the first process alone: the others have kept no samples.
    _report(trainer, result, merged, output, lambda: None if chosen else _live(steerable, scores))
    datamodule.teardown("test")


def sweep_by_test_steps(
    trainer: Trainer,
    steps: TestSteps,
    merged: str,
    output: str,
    pool: str | None,
    grid: PreferenceGrid,
) -> None:
    """Not launched as a whole: each test is, by the Trainer itself."""
    models = [steps.model, *(client.model for client in steps.clients.values())]
    steerable = load_merged(merged, next((module for module in models if module is not None), None))
    experts = pool_of(merged, steerable, pool)
    result = sweep_test_steps(trainer, steerable, experts, grid, steps)
    _report(trainer, result, merged, output, lambda: None)


def prepare_data(trainer: Trainer, datamodule: LightningDataModule) -> None:
    """Prepare data as a fit does: once, or once a node; then set up on every process."""
    datamodule.trainer = trainer
    on_first(trainer, datamodule.prepare_data)
    if datamodule.prepare_data_per_node and trainer.local_rank == 0 and not trainer.is_global_zero:
        datamodule.prepare_data()
    trainer.strategy.barrier("lightning_merge_prepare_data")
    datamodule.setup("test")


def _report(
    trainer: Trainer,
    result: SweepResult,
    merged: str,
    output: str,
    live: Callable[[], LiveModel | None],
) -> None:
    def write() -> None:
        try:
            record_scores(merged, result.summary())  # first: the sweep is newer than its model
        except OSError as error:
            warnings.warn(f"the model card of {merged} has no scores: {error}", stacklevel=2)
        result.save(output)
        paths = write_report(result, output, live())
        Console().print(console_table(result))
        for path in [Path(output) / "results.csv", *paths]:
            trainer.print(path)

    on_first(trainer, write)
    on_first(trainer, lambda: log_sweep(trainer.loggers, result, output))


def _live(model: MergedModel, scores: Mapping[str, Scores]) -> LiveModel | None:
    """What makes the report's sliders exact; ``None`` where a page cannot solve the correction."""
    normal = model.correction.normal_equations()
    simple = all(isinstance(head, nn.Linear) for head in model.heads.values())
    if normal is None or not simple:
        return None
    samples = {task: (found.features, found.labels) for task, found in scores.items()}
    return build_live(
        model.linear_heads(),
        normal,
        samples,
        samples_per_task=LIVE_SAMPLES,
        available={task: found.samples for task, found in scores.items()},
    )
