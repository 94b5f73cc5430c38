"""A Trainer that also merges, sweeps, diagnoses and exports, under its own devices and strategy."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_merge.correction import CorrectionOptions
from lightning_merge.diagnosing import diagnose_experts
from lightning_merge.evaluation import Scores
from lightning_merge.files import read_json
from lightning_merge.merged import FORMAT, VERSION, MergedModel
from lightning_merge.merging import BatchNorm, Correction, merge_experts
from lightning_merge.methods import Average, MergeMethod, WeightMethod
from lightning_merge.networks import named_state, plain_copy
from lightning_merge.pareto import SweepResult
from lightning_merge.pool import ExpertPool
from lightning_merge.report import LiveModel, build_live, console_table, write_report
from lightning_merge.report.diagnosis_figure import write_diagnosis_picture
from lightning_merge.selecting import corrections_with, select_from, select_merge
from lightning_merge.states import LazyStateDict
from lightning_merge.strategies import on_first, runtime_of, sharded
from lightning_merge.sweeping import PreferenceGrid, sweep_model

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
        """
        settings = (method, correction, tasks, batch_norm, batch_size)
        self._launch(self._merge, model, pool, output, *settings, select)

    def sweep(
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        *,
        merged: str,
        output: str,
        pool: str | None = None,
        grid: PreferenceGrid = PreferenceGrid(),  # noqa: B008 (frozen)
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
        """
        self._launch(self._sweep, model, datamodule, merged, output, pool, grid)

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
        format: Literal["safetensors", "onnx", "torch_export"] = "safetensors",  # noqa: A002
    ) -> None:
        """Write the model tailored to one preference to a file that needs nothing of this package.

        Args:
            model: Network to fill, where the merged model cannot build its own.
            datamodule: Not needed.
            merged: Folder of the merged model.
            output: The file to write.
            preference: Weight by task; tasks left out count 0.
            task: One task, with the expert's own parameter names; all tasks by default.
            format: Weights, or a program.
        """
        steerable = _load(merged, model)
        example = None
        if format != "safetensors":
            example = _example(steerable, task)
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
            work(*args)
            self.strategy.barrier("lightning_merge")
        finally:
            self.strategy.teardown()

    def _merge(
        self,
        model: LightningModule | None,
        pool: str,
        output: str,
        method: MergeMethod,
        correction: Correction,
        tasks: list[str] | None,
        batch_norm: BatchNorm,
        batch_size: int,
        select: bool | list[MergeMethod] = False,
    ) -> None:
        experts = ExpertPool.open(pool)
        network = network_within(model, experts.base, experts.head)
        if select is not False:
            selection = select_merge(
                experts,
                select_from(select, method, len(tasks or experts.tasks)),
                corrections=corrections_with(correction),
                module=network,
                tasks=tasks,
                batch_norm=batch_norm,
                batch_size=batch_size,
                runtime=runtime_of(self),
            )
            self.print(selection.summary())
            merged = selection.model
        else:
            merged = merge_experts(
                experts,
                method,
                correction=correction,
                module=network,
                tasks=tasks,
                batch_norm=batch_norm,
                batch_size=batch_size,
                runtime=runtime_of(self),
            )
        on_first(self, lambda: merged.save(output))
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
    ) -> None:
        if not isinstance(datamodule, TestSets):
            raise ValueError(
                "sweep needs the tasks' test sets: a datamodule with test_dataset(task) and "
                "dataloader(dataset), such as lightning_merge.data.TaskSuite (--data ...)."
            )
        suite: TestSets = datamodule
        runtime = runtime_of(self)
        self._prepare(datamodule)
        steerable = _load(merged, model)
        source = pool or steerable.record.get("pool")
        if source is None:
            raise ValueError(
                f"{merged} was merged from modules in memory, so the sweep does not know where its "
                "experts and base are: give pool=..., on the command line --pool."
            )
        result, scores = sweep_model(
            steerable,
            ExpertPool.open(source),
            lambda task: sharded(suite.dataloader(suite.test_dataset(task)), runtime),
            grid,
            runtime,
            keep=LIVE_SAMPLES,
        )

        def write() -> None:
            result.save(output)
            paths = write_report(result, output, _live(steerable, scores))
            Console().print(console_table(result))
            for path in [Path(output) / "results.csv", *paths]:
                self.print(path)

        on_first(self, write)
        self._log(result)
        datamodule.teardown("test")

    def _prepare(self, datamodule: LightningDataModule) -> None:
        """Prepare data as a fit does: once, or once a node; then set up on every process."""
        datamodule.trainer = self
        on_first(self, datamodule.prepare_data)
        if datamodule.prepare_data_per_node and self.local_rank == 0 and not self.is_global_zero:
            datamodule.prepare_data()
        self.strategy.barrier("lightning_merge_prepare_data")
        datamodule.setup("test")

    def _log(self, result: SweepResult) -> None:
        """One step a preference: its weights and scores; the named rows with the first."""
        rows = [
            {
                **{
                    f"preference/{task}": float(p)
                    for task, p in zip(result.tasks, weights, strict=True)
                },
                **{
                    f"{result.metric}/{task}": float(x)
                    for task, x in zip(result.tasks, scores, strict=True)
                },
                f"{result.metric}/mean": float(scores.mean()),
            }
            for weights, scores in zip(result.preferences, result.raw, strict=True)
        ]
        for row, values in result.summary()["rows"].items():
            rows[0] |= {f"{row}/{name}": values[name] for name in ("raw_mean", "normalized_mean")}
        for logger in self.loggers:
            for step, row in enumerate(rows):
                logger.log_metrics(row, step=step)
            logger.save()
            logger.finalize("success")


def network_within(model: nn.Module | None, names: Iterable[str], head: str) -> nn.Module | None:
    """Find the network in a LightningModule, whatever its name there: a copy, wrappers apart.

    Args:
        model: A LightningModule or any module; ``None`` gives ``None``.
        names: Names of the backbone's tensors in the network.
        head: Dotted path of the head in the network.

    Raises:
        ValueError: If no part of it has these names.
    """
    if model is None:
        return None
    wanted = set(names)
    for part in model.modules():
        found = set(named_state(part))
        if wanted <= found and any(name.startswith(f"{head}.") for name in found):
            return plain_copy(part)
    raise ValueError(
        f"no part of {type(model).__name__} has the backbone's {len(wanted)} tensors (such as "
        f"'{min(wanted, default='')}') and a head '{head}'. Give the module that was fine-tuned."
    )


def _named(kind: str, tasks: Iterable[str], values: Tensor) -> dict[str, float]:
    return {f"{kind}/{task}": x for task, x in zip(tasks, values.tolist(), strict=True)}


def _load(folder: str, model: nn.Module | None) -> MergedModel:
    if model is None:
        return MergedModel.load(folder)
    names = LazyStateDict(Path(folder) / "backbone.safetensors")
    head = read_json(Path(folder) / "merged.json", FORMAT, VERSION)["head"]
    return MergedModel.load(folder, module=network_within(model, names, head))


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


def _example(model: MergedModel, task: str | None) -> Any:
    pool = model.record.get("pool")
    inputs = ExpertPool.open(pool).calibration(task or model.tasks[0]) if pool else None
    if inputs is None:
        raise ValueError(
            "programs are traced on a batch of inputs, but the pool of this model has none: use "
            "MergedModel.export(..., example=inputs) from Python."
        )
    return inputs[slice(0, 2)]
