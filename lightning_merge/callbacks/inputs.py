"""Unlabeled calibration inputs out of whatever a project's loaders give."""

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

SOURCES = ("calibration", "val", "train")


def calibration_batches(
    trainer: Trainer,
    module: LightningModule,
    network: nn.Module,
    task: str,
    source: str,
    names: Sequence[str] | None,
) -> Iterator[Any]:
    """Batches of unlabeled inputs: the first source that there is, in its natural order.

    Args:
        trainer: The Trainer, after the fit.
        module: The LightningModule that was fitted.
        network: The network that takes the inputs; its signature tells the names it takes.
        task: The task, for datamodules that have a ``calibration_dataset(task)``.
        source: ``calibration``, ``val``, ``train``, or ``auto`` for the first of these.
        names: Names of the inputs in batches that are mappings or dataclasses.

    Raises:
        ValueError: If there is no such source, or a batch is of an unknown kind.
    """
    for name in SOURCES if source == "auto" else (source,):
        loaders = _loaders(trainer, task, name)
        if loaders:
            for loader in loaders:
                for batch in _in_order(loader):
                    yield unlabeled(batch, network, names)
            return
    raise ValueError(
        f"no calibration inputs from '{source}': the Trainer has no such dataloader. Choose "
        f"another of {', '.join(SOURCES)}, or give the datamodule a calibration_dataset(task)."
    )


def unlabeled(batch: Any, network: nn.Module, names: Sequence[str] | None) -> Any:
    """Inputs of a batch, without its labels.

    A tensor is the inputs; of a tuple or list the first item is; of a mapping or dataclass those
    named, by default those that the network's ``forward`` takes.
    """
    if isinstance(batch, Tensor):
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        batch = {item.name: getattr(batch, item.name) for item in dataclasses.fields(batch)}
    if isinstance(batch, Mapping):
        wanted = list(names) if names else _accepted(network, batch)
        if len(wanted) == 1 and not names and isinstance(batch[wanted[0]], Tensor):
            return batch[wanted[0]]
        return {name: batch[name] for name in wanted}
    if isinstance(batch, (tuple, list)) and batch:
        return unlabeled(batch[0], network, names)
    raise ValueError(
        f"a batch of {type(batch).__name__} has no inputs that are known: expected a tensor, a "
        "tuple with the inputs first, a mapping or a dataclass. Name them with inputs=[...]."
    )


def _accepted(network: nn.Module, batch: Mapping[str, Any]) -> list[str]:
    taken = inspect.signature(network.forward).parameters
    wanted = [name for name in batch if name in taken and "label" not in name]
    if not wanted:
        raise ValueError(
            f"the batch has {', '.join(map(str, batch))}, but {type(network).__name__}.forward "
            f"takes {', '.join(taken)}. Name the inputs with inputs=[...]."
        )
    return wanted


def _loaders(trainer: Trainer, task: str, source: str) -> list[Iterable[Any]]:
    if source == "calibration":
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "calibration_dataset"):
            return []
        return [DataLoader(datamodule.calibration_dataset(task), batch_size=128)]
    found = trainer.val_dataloaders if source == "val" else trainer.train_dataloader
    if found is None:
        return []
    if isinstance(found, Mapping):
        return list(found.values())
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _in_order(loader: Iterable[Any]) -> Iterable[Any]:
    # A shuffled or sharded loader is read again from its dataset, in order and by one process.
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size or 1,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
    )
