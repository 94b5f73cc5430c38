"""Finding what a stage needs: the network in a module, a merged model, its pool, an example."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from lightning_merge.backbones import read_backbone
from lightning_merge.merged import MergedModel
from lightning_merge.merged_folder import read_manifest
from lightning_merge.networks import named_state, plain_copy
from lightning_merge.pool import ExpertPool


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


def pool_of(merged: str, model: MergedModel, pool: str | None) -> ExpertPool:
    """The pool that a model was merged from, or the one given."""
    source = pool or model.record.get("pool")
    if source is None:
        raise ValueError(
            f"{merged} was merged from modules in memory, so the sweep does not know where its "
            "experts and base are: give pool=..., on the command line --pool."
        )
    return ExpertPool.open(source)


def load_merged(folder: str, model: nn.Module | None) -> MergedModel:
    """A merged model; where it does not know its network, with the one in a given module."""
    manifest = read_manifest(folder)
    if model is None or manifest["model"] is not None:
        return MergedModel.load(folder)
    names = read_backbone(Path(folder))
    return MergedModel.load(folder, module=network_within(model, names, manifest["head"]))


def example_inputs(model: MergedModel, task: str | None) -> Any:
    """Two calibration inputs of the model's pool, to trace a program on."""
    pool = model.record.get("pool")
    inputs = ExpertPool.open(pool).calibration(task or model.tasks[0]) if pool else None
    if inputs is None:
        raise ValueError(
            "programs are traced on a batch of inputs, but the pool of this model has none: use "
            "MergedModel.export(..., example=inputs) from Python."
        )
    return inputs[slice(0, 2)]
