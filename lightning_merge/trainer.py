"""A Trainer that also merges, sweeps, diagnoses and exports, under its own devices and strategy."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

from lightning_merge.backbones import parse_size
from lightning_merge.calibration import CalibrationInputs
from lightning_merge.checkpoints import read_checkpoint
from lightning_merge.correction import CorrectionOptions
from lightning_merge.diagnosing import diagnose_experts
from lightning_merge.evaluation import Scores
from lightning_merge.exporting import Format
from lightning_merge.hooks import through_hooks
from lightning_merge.importing import calibration_file, open_pool
from lightning_merge.loading import example_inputs, load_merged, network_within, pool_of
from lightning_merge.logging import log_sweep
from lightning_merge.lost import naming_lost_processes
from lightning_merge.merged import MergedModel, record_scores
from lightning_merge.merging import BatchNorm, Correction, SameBase, merge_experts
from lightning_merge.methods import Average, MergeMethod, WeightMethod
from lightning_merge.methods.interference import ReportDepth
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
from lightning_merge.strategies import on_first, runtime_of, sharded
from lightning_merge.sweeping import PreferenceGrid, sweep_model
from lightning_merge.testing import Client, TestSteps, sweep_test_steps

LIVE_SAMPLES = 200
"""Test samples of each task that the report's sliders are evaluated on, exactly."""


@runtime_checkable
class TestSets(Protocol):
    """What a sweep asks of a datamodule."""

    def test_dataset(self, task: str) -> Dataset[Any]:
        """Labelled test samples of one task."""

    def dataloader(self, dataset: Dataset[Any]) -> Iterable[Any]:
        """Batches of a dataset, in order."""


class MergeTrainer(Trainer):
    """Lightning's Trainer with ``merge``, ``sweep``, ``diagnose`` and ``export`` beside ``fit``."""

    def merge(
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        *,
        pool: str,
        output: str,
        method: MergeMethod = Average(),  # noqa: B008 (frozen)
        correction: CorrectionOptions | Literal["paper"] | None = CorrectionOptions(),  # noqa: B008
        tasks: list[str] | None = None,
        batch_norm: BatchNorm = "auto",
        batch_size: int = 128,
        select: bool | list[MergeMethod] = False,
        report: ReportDepth = "full",
        same_base: SameBase = "warn",
        shard_size: str = "5GB",
        dry_run: bool = False,
    ) -> None:
        """Merge the experts of a pool and calibrate the correction.

        Args:
            model: Network to fill, where the pool cannot build its own.
            datamodule: Not needed: calibration inputs are in the pool.
            pool: Folder of the expert pool.
            output: Folder of the merged model; an older one is replaced when the new one is whole.
            method: How the backbones are merged.
            correction: Options of the correction; ``paper`` for the published recipe, ``null`` for
                a merge without.
            tasks: Merge these only, in this order; all of the pool by default.
            batch_norm: Running statistics of batch norms: re-estimated on calibration inputs,
                averaged over the experts, or re-estimated where there are inputs.
            batch_size: Samples a forward pass.
            select: Score several merges by the cross-validated error of their correction, without
                labels, and keep the best: ``true`` for the default candidates, the base among
                them, beside ``method``, or a list of methods. Needs a ``correction``, which is
                tried beside the default ones.
            report: Measure how the experts interfere, layer by layer, for ``merged.json``,
                ``README.md`` and ``interference.png``: in full, without the singular directions
                of matrices (some seconds in a large model), or not at all.
            same_base: What to do about an expert that seems to come from another base.
            shard_size: Size from which the backbone is written in several files with an index.
            dry_run: List what each parameter would get, and write nothing.
        """
        if dry_run:
            self._dry_run(pool, method, tasks, select)
            return
        shared = {
            "tasks": tasks,
            "batch_norm": batch_norm,
            "batch_size": batch_size,
            "report": report,
            "same_base": same_base,
        }
        size = parse_size(shard_size)
        self._launch(self._merge, model, pool, output, method, correction, select, size, shared)

    def import_expert(
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        *,
        pool: str,
        task: str,
        checkpoint: str,
        head: str | None = None,
        base: str | None = None,
        spec: dict | None = None,  # type: ignore[type-arg] # bare: stays raw
        calibration: str | None = None,
        num_calibration: int = 2000,
        overwrite: bool = False,
    ) -> None:
        """Add an expert that exists already to a pool, without training.

        Args:
            model: Not needed.
            datamodule: Unlabeled inputs, if it has a ``calibration_dataset(task)``.
            pool: Folder of the expert pool; made from ``base`` if it does not exist.
            task: Name of the expert.
            checkpoint: Its weights: a ``.ckpt``, ``.pt`` or ``.safetensors`` file, or a folder of
                Hugging Face or timm.
            head: Dotted path of the head in the network; needed to make a pool.
            base: Weights that the experts were fine-tuned from; needed to make a pool.
            spec: How to build the network, ``{class_path, init_args}``; a timm folder knows.
            calibration: File of unlabeled inputs, ``.safetensors`` or ``.pt``: a tensor ``inputs``,
                or named ones.
            num_calibration: At most this many inputs are kept of the datamodule's.
            overwrite: Replace an expert of this name.
        """
        experts = open_pool(pool, head, base, spec)
        experts.check_task(task, overwrite=overwrite)
        inputs: Any = None if calibration is None else calibration_file(calibration)
        if inputs is None and hasattr(datamodule, "calibration_dataset"):
            assert datamodule is not None
            self._prepare(datamodule)
            batches = DataLoader(datamodule.calibration_dataset(task), batch_size=128)
            inputs = CalibrationInputs.collect(batches, num_calibration)
        state = read_checkpoint(checkpoint, stand_ins=True)
        experts.add(task, state, calibration=inputs, overwrite=overwrite)
        without = "" if inputs is not None else ", without calibration inputs: no correction yet"
        self.print(f"{pool}: added '{task}'{without}")

    def sweep(
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        *,
        merged: str,
        output: str,
        pool: str | None = None,
        grid: PreferenceGrid = PreferenceGrid(),  # noqa: B008 (frozen)
        metrics: dict[str, Metric] | None = None,
        via: Literal["forward", "test_step"] = "forward",
        metric: str | None = None,
        mode: Literal["max", "min"] | None = None,
        clients: dict[str, Client] | None = None,
        network: str | None = None,
    ) -> None:
        """Evaluate a merged model under every preference and write the report.

        Args:
            model: Network to fill, where the merged model cannot build its own.
            datamodule: Test sets by task, as ``TaskSuite`` has them.
            merged: Folder of the merged model.
            output: Folder of the results: tables, pictures and ``report.html``.
            pool: Folder of the expert pool, for the experts and the base; by default the one that
                the model was merged from.
            grid: Which preferences.
            metrics: Metric of each task, of (outputs, targets); by default those that the
                datamodule declares with ``test_metric(task)``, else the accuracy.
            via: ``forward`` runs each test set once for all preferences; ``test_step`` runs the
                project's own test loop once for each preference.
            metric: With ``test_step``: name under which the metric is logged.
            mode: With ``test_step``: whether the largest or the smallest is best.
            clients: With ``test_step``: the module, data and metric of tasks that have their own.
            network: With ``test_step``: dotted path of the network in the module; found by its
                names if not given.
        """
        if via == "test_step":
            if metrics is not None or mode is None:
                raise ValueError(
                    "via='test_step' reads a metric that the module logs: give --metric NAME and "
                    "--mode max or min, and no --metrics."
                )
            steps = TestSteps(
                model=model,
                data=datamodule,
                clients=clients or {},
                metric=metric,
                mode=mode,
                network=network,
            )
            self._sweep_test_steps(steps, merged, output, pool, grid)
            return
        if metric or mode or clients or network:
            raise ValueError(
                "metric, mode, clients and network are for --via test_step; the fast sweep takes "
                "metrics: {task: {class_path: ...}} or the datamodule's test_metric(task)."
            )
        self._launch(self._sweep, model, datamodule, merged, output, pool, grid, metrics)

    def diagnose(
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        *,
        pool: str,
        output: str,
        heuristics: list[WeightMethod] | None = None,
        tasks: list[str] | None = None,
        num_folds: int = 5,
        tokens_per_sample: int | None = 64,
        batch_size: int = 128,
    ) -> None:
        """Tell what merging these experts can keep, from calibration inputs alone.

        Args:
            model: Network to fill, where the pool cannot build its own.
            datamodule: Not needed: calibration inputs are in the pool.
            pool: Folder of the expert pool.
            output: Folder of the results: ``diagnosis.json``, ``layers.csv``, ``diagnosis.png``.
            heuristics: Methods to compare with; the average and task arithmetic by default.
            tasks: Diagnose these only, in this order; all of the pool by default.
            num_folds: Folds for the shares captured on samples left out.
            tokens_per_sample: At most as many columns (tokens, patches) of each sample; null: all.
            batch_size: Samples a forward pass.
        """
        settings = (heuristics, tasks, num_folds, tokens_per_sample, batch_size)
        self._launch(self._diagnose, model, pool, output, *settings)

    def export(
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        *,
        merged: str,
        output: str,
        preference: dict[str, float],
        task: str | None = None,
        format: Format = "safetensors",  # noqa: A002
    ) -> None:
        """Write the model tailored to one preference to a file that needs nothing of this package.

        Args:
            model: Network to fill, where the merged model cannot build its own.
            datamodule: Not needed.
            merged: Folder of the merged model.
            output: The file to write; a folder for ``timm``.
            preference: Weight by task; tasks left out count 0.
            task: One task, with the expert's own parameter names; all tasks by default.
            format: Weights, a program, or a folder that timm loads.
        """
        steerable = load_merged(merged, model)
        example = None
        if format in ("onnx", "torch_export"):
            example = example_inputs(steerable, task)
        path = steerable.export(output, preference, task, format, example)
        self.print(f"wrote {path}")

    def _launch(self, work: Callable[..., None], *args: Any) -> None:
        """Run a stage on all devices through the strategy's own launcher."""
        launcher = self.strategy.launcher
        if launcher is None:
            self._staged(work, *args)
        else:
            # Without trainer=: results are in files, and there is no module to send back.
            launcher.launch(self._staged, work, *args)

    def _staged(self, work: Callable[..., None], *args: Any) -> None:
        self.strategy.setup_environment()
        try:
            with naming_lost_processes(f"the {work.__name__.strip('_')}"):
                work(*args)
                self.strategy.barrier("lightning_merge")
        finally:
            self.strategy.teardown()

    def _dry_run(
        self,
        pool: str,
        method: MergeMethod,
        tasks: list[str] | None,
        select: bool | list[MergeMethod],
    ) -> None:
        experts = ExpertPool.open(pool)
        states = {task: experts.expert(task) for task in chosen_tasks(experts, tasks)}
        tried = [method] if select is False else select_from(select, method, len(states))
        self.print("\n\n".join(plan_text(one, experts.base, states) for one in tried))

    def _merge(
        self,
        model: LightningModule | None,
        pool: str,
        output: str,
        method: MergeMethod,
        correction: Correction,
        select: bool | list[MergeMethod],
        shard_size: int,
        shared: dict[str, Any],
    ) -> None:
        experts = ExpertPool.open(pool)
        network = network_within(model, experts.base, experts.head)
        if select is not False:
            selection = select_merge(
                experts,
                select_from(select, method, len(shared["tasks"] or experts.tasks)),
                corrections=corrections_with(correction),
                module=network,
                runtime=runtime_of(self),
                **shared,
            )
            self.print(selection.summary())
            merged = selection.model
        else:
            merged = merge_experts(
                experts,
                method,
                correction=correction,
                module=network,
                runtime=runtime_of(self),
                **shared,
            )
        on_first(
            self,
            lambda: merged.save(
                output, shard_size=shard_size, pictures=merge_pictures(merged.report)
            ),
        )
        facts = merged.correction.report() if merged.statistics else {}
        figures = {f"merge/r2/{task}": found["r2"] for task, found in facts.items()}
        for logger in self.loggers:
            logger.log_metrics(figures | merged.record["timings"], step=0)
            logger.save()
        self.print(f"wrote {output}")

    def _diagnose(
        self,
        model: LightningModule | None,
        pool: str,
        output: str,
        heuristics: list[WeightMethod] | None,
        tasks: list[str] | None,
        num_folds: int,
        tokens_per_sample: int | None,
        batch_size: int,
    ) -> None:
        experts = ExpertPool.open(pool)
        diagnosis = diagnose_experts(
            experts,
            heuristics=heuristics or (),
            num_folds=num_folds,
            tokens_per_sample=tokens_per_sample,
            module=network_within(model, experts.base, experts.head),
            tasks=tasks,
            batch_size=batch_size,
            runtime=runtime_of(self),
        )

        def write() -> None:
            paths = [*diagnosis.save(output), write_diagnosis_picture(diagnosis, output)]
            for line in [*diagnosis.recommendation(), *paths]:
                self.print(line)

        on_first(self, write)

    def _sweep(
        self,
        model: LightningModule | None,
        datamodule: LightningDataModule | None,
        merged: str,
        output: str,
        pool: str | None,
        grid: PreferenceGrid,
        metrics: dict[str, Metric] | None,
    ) -> None:
        if not isinstance(datamodule, TestSets):
            raise ValueError(
                "sweep needs the tasks' test sets: a datamodule with test_dataset(task) and "
                "dataloader(dataset), such as lightning_merge.data.TaskSuite (--data ...)."
            )
        suite: TestSets = datamodule
        runtime = runtime_of(self)
        self._prepare(datamodule)
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
        self._report(result, merged, output, lambda: None if chosen else _live(steerable, scores))
        datamodule.teardown("test")

    def _sweep_test_steps(
        self, steps: TestSteps, merged: str, output: str, pool: str | None, grid: PreferenceGrid
    ) -> None:
        """Not launched as a whole: each test is, by the Trainer itself."""
        models = [steps.model, *(client.model for client in steps.clients.values())]
        steerable = load_merged(
            merged, next((module for module in models if module is not None), None)
        )
        experts = pool_of(merged, steerable, pool)
        result = sweep_test_steps(self, steerable, experts, grid, steps)
        self._report(result, merged, output, lambda: None)

    def _report(
        self,
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
                self.print(path)

        on_first(self, write)
        on_first(self, lambda: log_sweep(self.loggers, result, output))

    def _prepare(self, datamodule: LightningDataModule) -> None:
        """Prepare data as a fit does: once, or once a node; then set up on every process."""
        datamodule.trainer = self
        on_first(self, datamodule.prepare_data)
        if datamodule.prepare_data_per_node and self.local_rank == 0 and not self.is_global_zero:
            datamodule.prepare_data()
        self.strategy.barrier("lightning_merge_prepare_data")
        datamodule.setup("test")


# A keyword of Python names the subcommand, so the class statement cannot name the method.
setattr(MergeTrainer, "import", MergeTrainer.import_expert)


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
