"""The LightningModule that fine-tunes one expert."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_merge.modules.base_checkpoint import load_base
from lightning_merge.modules.fixed_heads import load_fixed_head
from lightning_merge.modules.networks import create_timm, set_num_classes, timm_head
from lightning_merge.modules.transformers import transformers_spec
from lightning_merge.networks import call_network, get_submodule

Batch = Sequence[Tensor]

_OBJECTS = ("network", "loss", "optimizer", "lr_scheduler", "metric")


class ExpertModule(LightningModule):
    """Fine-tunes a backbone and its head on one task.

    The network is a timm model by name, or any module: an expert is a network and the path of
    its head. Inputs with names (``input_ids``, ``attention_mask``) are its keyword arguments, and
    an output with names has the scores as ``logits``, so classifiers of transformers serve as
    they are. Logs ``train/loss``, ``val/loss``, ``val/accuracy``, ``test/loss`` and
    ``test/accuracy``.

    Attributes:
        network: Backbone and head together; ``forward(x)`` is ``network(x)``, or
            ``network(**x)`` where the inputs have names.
        head: Dotted path of the head in ``network``.

    Args:
        model: Name of a timm model; either this or ``network``.
        model_args: More arguments of ``timm.create_model``, such as ``in_chans``.
        pretrained: Start from timm's weights; a string is the tag of the weights (needs the
            network once).
        network: Any module, by class_path and init_args; either this or ``model``.
        base_checkpoint: Local checkpoint to take the backbone from: .safetensors, a state dict of
            torch.save, or a Lightning checkpoint. The head starts anew.
        head: Dotted path of the head in the network. None: timm's classifier.
        num_classes: Outputs of the head. None: what the data module says when a stage starts.
        loss: Module of (scores, labels). None: cross-entropy.
        optimizer: Optimizer of all parameters.
        lr_scheduler: Schedule, given the optimizer and the number of steps of the whole fit and
            stepped with every batch. None: a constant learning rate.
        metric: Metric of (scores, labels), given the number of classes. None: the fraction of
            correct answers.
        metric_name: Name under which the metric is logged, after val/ and test/.
        heads: Folder of heads that are not trained, TASK.safetensors, such as the zero-shot
            heads of CLIP. None: a new head is trained with the backbone.

    Raises:
        ValueError: If not exactly one of ``model`` and ``network`` is given, if the head is not
            found, or if the base checkpoint does not fit.
    """

    def __init__(
        self,
        model: str | None = None,
        model_args: dict | None = None,  # type: ignore[type-arg]  # a plain dict stays as it is
        pretrained: bool | str = False,
        network: nn.Module | None = None,
        base_checkpoint: str | Path | None = None,
        head: str | None = None,
        num_classes: int | None = None,
        loss: nn.Module | None = None,
        optimizer: Callable[[Iterable[Any]], Optimizer] = torch.optim.AdamW,
        lr_scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        metric: Callable[[int], Metric] | None = None,
        metric_name: str = "accuracy",
        heads: str | Path | None = None,
    ) -> None:
        super().__init__()
        _check_source(model, network, model_args, pretrained, base_checkpoint, head)
        self._model, self._model_args = model, dict(model_args or {})
        self._network_spec = _record(self)
        if network is None:
            assert model is not None
            network = create_timm(model, self._model_args, pretrained, num_classes or 0)
        self.head: str = head or timm_head(network)
        get_submodule(network, self.head)
        self.network = network
        self.num_classes: int | None = None
        self._declared_classes = num_classes
        self.loss = loss or nn.CrossEntropyLoss()
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._metric = metric or partial(MulticlassAccuracy, average="micro")
        self.metric_name = metric_name
        self._heads = None if heads is None else Path(heads)
        if base_checkpoint is not None:
            load_base(network, self.head, base_checkpoint)
        if num_classes is not None:
            self._build_head(num_classes)

    @property
    def network_spec(self) -> dict[str, Any] | None:
        """Class path and arguments that rebuild the network, its weights apart, as plain data.

        Never asks for pre-trained weights. None for a module that was not made from a config.
        """
        if self._model is None:
            own = getattr(self.network, "network_spec", None) or transformers_spec(self.network)
            return own or self._network_spec
        arguments = {"model_name": self._model, "pretrained": False, **self._model_args}
        if self.num_classes is not None:
            arguments["num_classes"] = self.num_classes
        return {"class_path": "timm.create_model", "init_args": arguments}

    @override
    def configure_model(self) -> None:
        """Build the head for the data module's number of classes, unless it is there already."""
        data = getattr(self._trainer, "datamodule", None)
        found = getattr(data, "num_classes", None)
        known = self.num_classes
        if known is not None and found is not None and known != found:
            raise ValueError(
                f"the head has {known} classes, but {type(data).__name__} has {found}. "
                "Leave num_classes out to take the data's number."
            )
        if known is None and found is None:
            raise ValueError(
                "the number of classes is not known: neither num_classes is given nor does the "
                "data module have a 'num_classes'. Give --model.num_classes."
            )
        if known is None and found is not None:
            with _rng_of(getattr(data, "task", None)):
                self._build_head(int(found))
        if self._heads is not None:
            task = getattr(data, "task", None)
            if not isinstance(task, str):
                raise ValueError("fixed heads are found by the data module's 'task'; it has none.")
            load_fixed_head(self.network, self.head, self._heads / f"{task}.safetensors")

    def _build_head(self, num_classes: int) -> None:
        if self._model is None:
            set_num_classes(self.network, self.head, num_classes)
        elif self._declared_classes is None:  # otherwise timm has built it
            self.network.reset_classifier(num_classes)  # type: ignore[operator]
        self.num_classes = num_classes
        self.metrics = nn.ModuleDict(
            {f"{stage}_metric": self._metric(num_classes) for stage in ("val", "test")}
        )

    @override
    def forward(self, x: Any) -> Any:
        """Scores of the classes: the network's output, or the ``logits`` in it."""
        output = call_network(self.network, x)
        return output["logits"] if isinstance(output, Mapping) else output

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        inputs, labels = batch
        loss: Tensor = self.loss(self(inputs), labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and metric of one batch."""
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and metric of one batch."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str) -> None:
        inputs, labels = batch
        scores = self(inputs)
        metric = self.metrics[f"{stage}_metric"]
        assert isinstance(metric, Metric)
        metric.update(scores, labels)
        loss, size = self.loss(scores, labels), len(labels)
        self.log(f"{stage}/loss", loss, sync_dist=True, batch_size=size)
        self.log(f"{stage}/{self.metric_name}", metric, prog_bar=True, batch_size=size)

    @override
    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule over the steps of the whole fit."""
        optimizer = self._optimizer(self.parameters())
        if self._lr_scheduler is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if steps != int(min(steps, 2**62)) or steps < 0:
            raise ValueError(
                "the schedule needs the number of steps of the whole fit, and it is endless. Give "
                "trainer.max_epochs or trainer.max_steps, or leave model.lr_scheduler out."
            )
        schedule = self._lr_scheduler(optimizer, int(steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _check_source(
    model: str | None,
    network: nn.Module | None,
    model_args: dict[str, Any] | None,
    pretrained: bool | str,
    base_checkpoint: str | Path | None,
    head: str | None,
) -> None:
    if (model is None) == (network is None):
        found = "neither" if model is None else "both"
        raise ValueError(
            f"give either 'model' (a timm name) or 'network' (a module), found {found}."
        )
    if network is not None and (model_args or pretrained):
        raise ValueError(
            "'model_args' and 'pretrained' belong to timm models; give the arguments of 'network' "
            "in its own init_args."
        )
    if network is not None and head is None:
        children = ", ".join(name for name, _ in network.named_children())
        raise ValueError(
            f"give the 'head' of {type(network).__name__}: the dotted path of the module that "
            f"turns features into class scores. Its children are {children}."
        )
    if pretrained and base_checkpoint is not None:
        raise ValueError("give either 'pretrained' or 'base_checkpoint' as the base, found both.")


@contextmanager
def _rng_of(task: object) -> Iterator[None]:
    """Draw from the global seed and the task's name; without a name, from the global stream.

    Experts are fine-tuned with one ``seed_everything``. If that gave them one and the same first
    head, all finished heads would read nearly the same few directions, since a short fine-tuning
    hardly moves a head; every task then needs its own features there, and one shared correction
    must trade them. Measured on Glyphs (two draws each): 0.76 of the experts with a shared first
    head and 0.90 with own ones, corrected at equal preference; 0.70 and 0.75 uncorrected. Each
    task under its own preference does not suffer (0.99 both).
    """
    if not isinstance(task, str):
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((torch.initial_seed() + zlib.crc32(task.encode())) % 2**63)
        yield


def _record(module: ExpertModule) -> dict[str, Any] | None:
    """Save the hyper-parameters as plain data; return the network's class path and arguments.

    Made from a config, Lightning knows all of them as plain data. Made in Python, the objects
    among them are left out, because a checkpoint that holds them needs unpickling.
    """
    given = _given_hyperparameters.get()
    if given is None:
        return None
    module.save_hyperparameters()
    spec = given.get("network")
    return dict(spec) if spec else None
