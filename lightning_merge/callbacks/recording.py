"""Record the expert that a fit makes, and merge when the last one is in."""

import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from lightning_merge.calibration import CalibrationInputs
from lightning_merge.callbacks.inputs import calibration_batches
from lightning_merge.callbacks.specs import build_correction, build_method, plain
from lightning_merge.checkpoints import read_checkpoint
from lightning_merge.hooks import evaluating
from lightning_merge.importing import shell
from lightning_merge.lost import naming_lost_processes
from lightning_merge.merging import merge_experts
from lightning_merge.networks import get_submodule, name_within, plain_copy
from lightning_merge.pool import FIT_SECONDS, ExpertPool
from lightning_merge.report import merge_pictures
from lightning_merge.states import StateDict
from lightning_merge.strategies import on_first, runtime_of

REFUSED = ("FSDPStrategy", "DeepSpeedStrategy")
GATHERED = "ModelParallelStrategy"


class Recording:
    """Records a fit's base and expert in a pool; merges when the declared tasks are all in.

    What a callback of ``lightning`` and one of ``pytorch_lightning`` share: it knows the classes of
    both by their names, never by identity.

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
        num_calibration: At most this many inputs are kept, spread evenly over the source.
        inputs: Names of the inputs where batches are mappings; by default those that the
            network's ``forward`` takes.
        model: How to build the network again, ``{class_path, init_args}``; by default the
            ``network_spec`` of an ``ExpertModule``. Without it, loading needs the module.
        overwrite: Replace an expert of this name.
        tasks: The tasks that are to be merged, when the last of them is in. Without them experts
            are only recorded.
        merged: Folder of the merged model; by default ``merged`` beside the pool.
        method: Merging method: ``{class_path, init_args}`` with the whole path, or its name alone,
            such as ``TIES``; the average by default.
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
        if tasks is not None and (len(tasks) < 2 or len(set(tasks)) < len(tasks)):
            raise ValueError(f"tasks must name at least two different tasks, found {plain(tasks)}.")
        self.pool = Path(pool)
        self.task = task
        self.head = head
        self.network = network
        self.weights = weights
        self.calibration = calibration
        self.num_calibration = num_calibration
        self.inputs: Sequence[str] | None = plain(inputs)
        if isinstance(model, nn.Module):
            raise ValueError(
                f"model is how to build the network, {{class_path, init_args}}, but a "
                f"{type(model).__name__} came: Hydra builds every '_target_'. Write class_path "
                "instead, or instantiate the callback with _recursive_: false."
            )
        self.model: Mapping[str, Any] | None = plain(model)
        self.overwrite = overwrite
        self.tasks: list[str] | None = plain(tasks)
        self.merged = Path(merged) if merged else self.pool.parent / "merged"
        # Built now, so that a typing error is found before the training and not after it.
        self.method = build_method(method)
        self.correction = build_correction({} if correction == "default" else correction)
        self._trained_from: str | None = None
        self._started = 0.0

    @property
    def state_key(self) -> str:
        """One state for each pool and network, so that several callbacks may stand side by side."""
        return self._generate_state_key(  # type: ignore[attr-defined] # of either Callback
            pool=str(self.pool), network=self.network
        )

    def state_dict(self) -> dict[str, Any]:
        """Which base the fit started from, kept with its checkpoints."""
        return {"trained_from": self._trained_from}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a resumed fit started from."""
        self._trained_from = state_dict["trained_from"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what would fail after the training; record the base."""
        if _is_dry(trainer):
            return
        self._check(trainer, pl_module)
        whole = self._whole(trainer, pl_module)
        self._trained_from = on_first(trainer, lambda: self._start(trainer, pl_module, whole))
        self._started = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the expert, and merge if it was the last one."""
        if _is_dry(trainer):
            return
        whole = self._whole(trainer, pl_module)
        if not on_first(trainer, lambda: self._record(trainer, pl_module, whole)):
            return
        with naming_lost_processes("the merge; the expert is in the pool, so merge from there"):
            self._merge(trainer, pl_module)

    def _merge(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sharded = _is(trainer.strategy, GATHERED)  # shards cannot be copied: the pool builds it
        model = merge_experts(
            ExpertPool.open(self.pool),
            self.method,
            correction=self.correction,
            module=None if sharded else plain_copy(self._network(pl_module), without=trainer),
            tasks=self.tasks,
            runtime=runtime_of(trainer),
        )
        on_first(
            trainer,
            lambda: model.save(self.merged, pictures=merge_pictures(model.report, model.files)),
        )

    def _whole(self, trainer: Trainer, pl_module: LightningModule) -> nn.Module:
        """The network with whole weights: itself, or on the first process what all have of it."""
        network = self._network(pl_module)
        if not _is(trainer.strategy, GATHERED):
            return network
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = get_model_state_dict(network, options=options)
        return shell(state, self._head(pl_module))

    def _start(self, trainer: Trainer, pl_module: LightningModule, whole: nn.Module) -> str | None:
        """Record the base or compare with the one of the pool; return its fingerprint."""
        task, head = self._task(trainer), self._head(pl_module)
        if trainer.ckpt_path is None:
            pool = ExpertPool.create(
                self.pool, whole, head, model=self._model(pl_module), exist_ok=True
            )
        else:
            pool = self._resumed()
        pool.check_task(task, overwrite=self.overwrite)
        return pool.fingerprint if trainer.ckpt_path is None else self._trained_from

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy, task = trainer.strategy, self._task(trainer)
        if _is(strategy, *REFUSED):
            raise ValueError(
                f"MergeCallback reads whole weights, but {type(strategy).__name__} shards them. "
                "Fit under 'ddp', on one device or with ModelParallelStrategy (FSDP2), or add a "
                "whole checkpoint with `lightning-merge import` or ExpertPool.add."
            )
        if _is(strategy, GATHERED):
            self._check_gathered(trainer, pl_module)
        if self.tasks is not None and task not in self.tasks:
            raise ValueError(
                f"the task '{task}' is none of those to merge: {', '.join(self.tasks)}. Add it to "
                "tasks, or leave tasks out to record the expert alone."
            )
        if self.weights == "best" and _monitoring(trainer) is None:
            raise ValueError(
                "weights='best' needs a ModelCheckpoint that monitors a metric and keeps files; "
                "there is none. Add one, or choose weights='last'."
            )

    def _check_gathered(self, trainer: Trainer, pl_module: LightningModule) -> None:
        whole_files = not getattr(trainer.strategy, "_save_distributed_checkpoint", True)
        if self.weights != "last" and _monitoring(trainer) is not None and not whole_files:
            raise ValueError(
                "the best checkpoint of a ModelParallelStrategy is a folder of shards, which is "
                "not read: give the strategy save_distributed_checkpoint=False, or choose "
                "weights='last'."
            )
        if self.tasks is not None and self._model(pl_module) is None:
            raise ValueError(
                "a merge after a sharded fit builds the network anew: give the callback "
                "model={class_path, init_args}, or leave tasks out and run `lightning-merge merge`."
            )

    def _record(self, trainer: Trainer, pl_module: LightningModule, whole: nn.Module) -> bool:
        """Add the expert to the pool; return whether the declared tasks are now all in."""
        network, task = self._network(pl_module), self._task(trainer)
        expert, scores = self._best(trainer, pl_module) or (whole, _scores(trainer))
        scores |= {FIT_SECONDS: time.perf_counter() - self._started}
        batches = calibration_batches(
            trainer, network, task, self.calibration, self.inputs, self.num_calibration
        )
        with evaluating(trainer, pl_module):  # hooks of the batches ask whether it trains
            inputs = CalibrationInputs.collect(batches, self.num_calibration)
        pool = ExpertPool.open(self.pool)
        pool.add(
            task,
            expert,
            calibration=inputs,
            scores=scores,
            trained_from=self._trained_from,
            overwrite=self.overwrite,
        )
        return self.tasks is not None and set(self.tasks) <= set(pool.tasks)

    def _best(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> tuple[StateDict, dict[str, float]] | None:
        """Weights and score of the best checkpoint, or ``None`` where the last ones are wanted."""
        checkpoint = None if self.weights == "last" else _monitoring(trainer)
        if checkpoint is None or not checkpoint.best_model_path:
            if self.weights == "best":
                raise ValueError(
                    "weights='best', but the ModelCheckpoint has saved no best checkpoint: was "
                    "its metric logged? Repeat the fit with weights='last', or resume it."
                )
            return None
        state = read_checkpoint(checkpoint.best_model_path, stand_ins=True)
        # By its own path: a teacher or an averaged copy in the module has the same names.
        prefix = name_within(pl_module, self._network(pl_module))
        inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        score, monitor = checkpoint.best_model_score, checkpoint.monitor
        return inside, {} if score is None or monitor is None else {monitor: float(score)}

    def _resumed(self) -> ExpertPool:
        if not (self.pool / "pool.json").exists():
            raise ValueError(
                f"the fit is resumed from a checkpoint, so its weights are not the base, and "
                f"{self.pool} does not exist. Create it from the base first: "
                "ExpertPool.create(path, base=module, head=...)."
            )
        pool = ExpertPool.open(self.pool)
        if self._trained_from is None:
            warnings.warn(
                "the checkpoint that the fit is resumed from was written without this "
                f"MergeCallback, so it is not known whether it started from the base of "
                f"{self.pool}. Make sure that it did.",
                stacklevel=2,
            )
        elif self._trained_from != pool.fingerprint:
            raise ValueError(
                f"the fit is resumed from a checkpoint that started from another base "
                f"(fingerprint {self._trained_from[:12]}) than the one of {self.pool} "
                f"({pool.fingerprint[:12]}). Give the pool that it started with."
            )
        return pool

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
        known = getattr(pl_module, "network", None)
        # As ExpertModule has them: the network, and the path of the head in it.
        if isinstance(known, nn.Module) and isinstance(getattr(pl_module, "head", None), str):
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


def _is(thing: object, *names: str) -> bool:
    """Whether a thing is of a class of one of these names, of ``lightning`` or its older twin."""
    return any(kind.__name__ in names for kind in type(thing).__mro__)


def _is_dry(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))


def _monitoring(trainer: Trainer) -> ModelCheckpoint | None:
    for callback in trainer.checkpoint_callbacks:
        found: Any = callback
        if _is(found, "ModelCheckpoint") and found.monitor and found.save_top_k:
            return found
    return None


def _scores(trainer: Trainer) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if value.numel() == 1 and torch.isfinite(value).all()
    }
