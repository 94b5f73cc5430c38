"""Record the expert that a fit makes, and merge when the last one is in."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from typing_extensions import override

from lightning_merge.calibration import CalibrationInputs
from lightning_merge.callbacks.inputs import calibration_batches
from lightning_merge.callbacks.specs import build_correction, build_method, plain
from lightning_merge.checkpoints import read_checkpoint
from lightning_merge.merging import merge_experts
from lightning_merge.networks import get_submodule, plain_copy
from lightning_merge.pool import ExpertPool
from lightning_merge.strategies import on_first, runtime_of


class MergeCallback(Callback):
    """Records a fit's base and expert in a pool; merges when the declared tasks are all in.

    At the start of a fit the network is the pool's base; at its end the expert, its head, its
    unlabeled calibration inputs and its scores are added. All arguments are plain data.

    Args:
        pool: Folder of the expert pool; made by the first fit.
        task: Name of the task; by default the ``task`` of the datamodule.
        head: Dotted path of the head in the network, such as ``net.9``; by default the ``head`` of
            an ``ExpertModule``.
        network: Dotted path of the network in the LightningModule; by default the whole of it, or
            the ``network`` of an ``ExpertModule``.
        weights: Which weights are the expert: ``best`` of a ``ModelCheckpoint`` that monitors a
            metric, ``last`` (averaged, where a weight-averaging callback ran), or ``auto``: best
            where there is such a checkpoint, else last.
        calibration: Where unlabeled inputs come from: ``calibration`` (the datamodule's
            ``calibration_dataset(task)``), ``val``, ``train``, or ``auto``: the first there is.
        num_calibration: At most this many inputs are kept.
        inputs: Names of the inputs where batches are mappings; by default those that the
            network's ``forward`` takes.
        model: How to build the network again, ``{class_path, init_args}``; by default the
            ``network_spec`` of an ``ExpertModule``. Without it, loading needs the module.
        overwrite: Replace an expert of this name.
        tasks: The tasks that are to be merged. Without them experts are only recorded.
        merged: Folder of the merged model; by default ``merged`` beside the pool.
        method: Merging method, ``{class_path, init_args}`` or its name; the average by default.
        correction: Options of the correction, ``paper`` for the published recipe, or ``none``.
    """

    def __init__(
        self,
        pool: str,
        task: str | None = None,
        head: str | None = None,
        network: str | None = None,
        weights: Literal["auto", "best", "last"] = "auto",
        calibration: Literal["auto", "calibration", "val", "train"] = "auto",
        num_calibration: int = 2000,
        inputs: list[str] | None = None,
        model: dict | None = None,  # type: ignore[type-arg] # bare: stays raw in a user's CLI
        overwrite: bool = False,
        tasks: list[str] | None = None,
        merged: str | None = None,
        method: dict | str | None = None,  # type: ignore[type-arg]
        correction: dict | str | None = "default",  # type: ignore[type-arg]
    ) -> None:
        if num_calibration < 1:
            raise ValueError(f"num_calibration must be at least 1, found {num_calibration}.")
        self.pool = Path(pool)
        self.task = task
        self.head = head
        self.network = network
        self.weights = weights
        self.calibration = calibration
        self.num_calibration = num_calibration
        self.inputs: Sequence[str] | None = plain(inputs)
        self.model: Mapping[str, Any] | None = plain(model)
        self.overwrite = overwrite
        self.tasks: list[str] | None = plain(tasks)
        self.merged = Path(merged) if merged else self.pool.parent / "merged"
        # Built now, so that a typing error is found before the training and not after it.
        self.method = build_method(method)
        self.correction = build_correction({} if correction == "default" else correction)
        self._trained_from: str | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"trained_from": self._trained_from}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._trained_from = state_dict["trained_from"]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _is_dry(trainer):
            return
        task, head = self._task(trainer), self._head(pl_module)
        if self.weights == "best" and _monitoring(trainer) is None:
            raise ValueError(
                "weights='best' needs a ModelCheckpoint that monitors a metric; there is none. Add "
                "one, or choose weights='last'."
            )

        def start() -> str | None:
            network = self._network(pl_module)
            if trainer.ckpt_path is not None:
                return self._resumed()
            pool = ExpertPool.create(
                self.pool, network, head, model=self._model(pl_module), exist_ok=True
            )
            pool.check_task(task, overwrite=self.overwrite)
            return pool.fingerprint

        self._trained_from = on_first(trainer, start)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _is_dry(trainer):
            return
        task = self._task(trainer)
        on_first(trainer, lambda: self._record(trainer, pl_module, task))
        pool = ExpertPool.open(self.pool)
        if self.tasks is None or any(name not in pool.tasks for name in self.tasks):
            return
        runtime = runtime_of(trainer)
        model = merge_experts(
            pool,
            self.method,
            correction=self.correction,
            module=self._template(trainer, pl_module),
            tasks=self.tasks,
            runtime=runtime,
        )
        on_first(trainer, lambda: model.save(self.merged))

    def _record(self, trainer: Trainer, pl_module: LightningModule, task: str) -> None:
        network = self._network(pl_module)
        scores = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if torch.is_tensor(value) and value.numel() == 1 and torch.isfinite(value).all()
        }
        expert: Any = network
        checkpoint = _monitoring(trainer)
        if self.weights != "last" and checkpoint is not None and checkpoint.best_model_path:
            expert = read_checkpoint(checkpoint.best_model_path, stand_ins=True)
            if checkpoint.best_model_score is not None and checkpoint.monitor is not None:
                scores[checkpoint.monitor] = float(checkpoint.best_model_score)
        batches = calibration_batches(
            trainer, pl_module, network, task, self.calibration, self.inputs
        )
        ExpertPool.open(self.pool).add(
            task,
            expert,
            calibration=CalibrationInputs.collect(batches, self.num_calibration),
            scores=scores,
            trained_from=self._trained_from,
            overwrite=self.overwrite,
        )

    def _resumed(self) -> str | None:
        if not (self.pool / "pool.json").exists():
            raise ValueError(
                f"the fit is resumed from a checkpoint, so its weights are not the base, and "
                f"{self.pool} does not exist. Create it from the base first: "
                "ExpertPool.create(path, base=module, head=...)."
            )
        return self._trained_from

    def _task(self, trainer: Trainer) -> str:
        task = self.task or getattr(getattr(trainer, "datamodule", None), "task", None)
        if not isinstance(task, str):
            raise ValueError(
                "MergeCallback does not know the task: give task=..., on the command line "
                "--trainer.callbacks.task NAME, or a datamodule with a 'task'."
            )
        return task

    def _network(self, pl_module: LightningModule) -> nn.Module:
        if self.network is not None:
            return get_submodule(pl_module, self.network)
        if self.head is None and isinstance(getattr(pl_module, "network", None), nn.Module):
            return get_submodule(pl_module, "network")
        return pl_module

    def _head(self, pl_module: LightningModule) -> str:
        head = self.head or getattr(pl_module, "head", None)
        if not isinstance(head, str):
            # Names the linear layers that the network has.
            get_submodule(self._network(pl_module), "<head>")
            raise AssertionError
        return head

    def _model(self, pl_module: LightningModule) -> Mapping[str, Any] | None:
        return self.model or getattr(pl_module, "network_spec", None)

    def _template(self, trainer: Trainer, pl_module: LightningModule) -> nn.Module:
        return plain_copy(self._network(pl_module), without=trainer)


def _is_dry(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))


def _monitoring(trainer: Trainer) -> ModelCheckpoint | None:
    callbacks = trainer.checkpoint_callbacks
    monitoring = [c for c in callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]
    return monitoring[0] if monitoring else None
