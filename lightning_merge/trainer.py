"""A Trainer that also merges, sweeps, diagnoses and exports, under its own devices and strategy."""

from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_merge import stages
from lightning_merge.backbones import parse_size
from lightning_merge.calibration import CalibrationInputs
from lightning_merge.checkpoints import read_checkpoint
from lightning_merge.correction import CorrectionOptions
from lightning_merge.exporting import Format
from lightning_merge.importing import calibration_file, open_pool
from lightning_merge.loading import example_inputs, load_merged
from lightning_merge.lost import naming_lost_processes
from lightning_merge.merging import BatchNorm, SameBase
from lightning_merge.methods import Average, ExpertStore, MergeMethod, TSVCompress, WeightMethod
from lightning_merge.methods.interference import ReportDepth
from lightning_merge.sweeping import PreferenceGrid
from lightning_merge.testing import Client, TestSteps


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
            stages.dry_run(self, pool, method, tasks, select)
            return
        shared = {
            "tasks": tasks,
            "batch_norm": batch_norm,
            "batch_size": batch_size,
            "report": report,
            "same_base": same_base,
        }
        size = parse_size(shard_size)
        self._launch(stages.merge, model, pool, output, method, correction, select, size, shared)

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
            stages.prepare_data(self, datamodule)
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
            stages.sweep_by_test_steps(self, steps, merged, output, pool, grid)
            return
        if metric or mode or clients or network:
            raise ValueError(
                "metric, mode, clients and network are for --via test_step; the fast sweep takes "
                "metrics: {task: {class_path: ...}} or the datamodule's test_metric(task)."
            )
        self._launch(stages.sweep, model, datamodule, merged, output, pool, grid, metrics)

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
        num_samples: int | None = None,
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
            num_samples: At most as many calibration samples of each task, evenly spread; null: all.
            batch_size: Samples a forward pass.
        """
        settings = (heuristics, tasks, num_folds, tokens_per_sample, num_samples, batch_size)
        self._launch(stages.diagnose, model, pool, output, *settings)

    def compress(
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        *,
        pool: str,
        output: str,
        method: ExpertStore = TSVCompress(),  # noqa: B008 (frozen)
        tasks: list[str] | None = None,
    ) -> None:
        """Keep all experts of a pool in one small file, from which any of them is rebuilt.

        Args:
            model: Not needed.
            datamodule: Not needed.
            pool: Folder of the expert pool.
            output: The ``.safetensors`` file to write.
            method: What is kept of each expert.
            tasks: Keep these only, in this order; all of the pool by default.
        """
        stages.compress(self, pool, output, method, tasks)

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
            with naming_lost_processes(f"the {work.__name__}"):
                work(self, *args)
                self.strategy.barrier("lightning_merge")
        finally:
            self.strategy.teardown()


# A keyword of Python names the subcommand, so the class statement cannot name the method.
setattr(MergeTrainer, "import", MergeTrainer.import_expert)
