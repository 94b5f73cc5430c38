"""Unlabeled calibration inputs out of whatever a project's loaders give."""

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_merge.hooks import through_hooks
from lightning_merge.strategies import reading_order, reordered

SOURCES = ("calibration", "val", "train")


def calibration_batches(
    trainer: Trainer,
    network: nn.Module,
    task: str,
    source: str,
    names: Sequence[str] | None,
    limit: int,
) -> Iterator[Any]:
    """Batches of unlabeled inputs: the first source that there is.

    Where the source has more samples than are wanted, they are spread evenly over it, as data
    sets are often sorted by class. Batches pass the transfer hooks of the project on their way, as
    they do in its own loops.

    Args:
        trainer: The Trainer, after the fit.
        network: The network that takes the inputs; its signature tells the names it takes.
        task: The task, for datamodules that have a ``calibration_dataset(task)``.
        source: ``calibration``, ``val``, ``train``, or ``auto`` for the first of these.
        names: Names of the inputs in batches that are mappings or dataclasses.
        limit: Samples that are wanted.

    Raises:
        ValueError: If there is no such source, or a batch is of an unknown kind.
    """
    for name in SOURCES if source == "auto" else (source,):
        loaders = _loaders(trainer, task, name)
        if loaders:
            owners = (getattr(trainer, "datamodule", None), trainer.lightning_module)
            for batch in through_hooks(_spread(loaders, limit), *owners):
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
        if missing := [name for name in wanted if name not in batch]:
            raise ValueError(
                f"there is no {', '.join(repr(name) for name in missing)} among the inputs of a "
                f"batch: it has {', '.join(map(str, batch))}. Change inputs=[...]."
            )
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


def _spread(loaders: list[Iterable[Any]], limit: int) -> Iterator[Any]:
    orders = [reading_order(loader) for loader in loaders]
    total = sum(len(order) for order in orders if order is not None)
    for loader, order in zip(loaders, orders, strict=True):
        if order is None or not isinstance(loader, DataLoader) or loader.batch_sampler is None:
            yield from loader
            continue
        # A share of the limit, rounded up; what is too much is cut off at the end.
        wanted = min(len(order), -(-limit * len(order) // total))
        picked = [order[position * len(order) // wanted] for position in range(wanted)]
        yield from reordered(loader, picked)
