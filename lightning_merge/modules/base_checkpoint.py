"""Start from the backbone of a local checkpoint, whatever wrote it."""

from pathlib import Path

from torch import nn

from lightning_merge.checkpoints import read_checkpoint, under_prefix
from lightning_merge.networks import clean_names, load_backbone, split_state
from lightning_merge.states import tied_names


def load_base(network: nn.Module, head: str, path: str | Path) -> None:
    """Copy everything outside the head from a checkpoint into the network, in place.

    Names in the file may stand behind any one prefix (``network.``, ``model.encoder.``), as they
    do when the network was an attribute of a LightningModule. What else the file holds, an old
    head for instance, is not read. Nothing is changed unless all of it fits.

    Args:
        network: The whole network.
        head: Dotted path of its head, whose weights stay as they are.
        path: A ``.safetensors`` file, or a file of ``torch.save``: a state dict, or a Lightning
            checkpoint. Nothing in it is run.

    Raises:
        ValueError: If the file is missing or not readable, or lacks a parameter, or has one of
            another shape.
    """
    backbone, _ = split_state(network, head)
    ties = tied_names(backbone)
    names = [name for name in backbone if name not in ties]
    _, found = under_prefix(clean_names(read_checkpoint(path)), names, str(path))
    try:
        load_backbone(network, {name: found[name] for name in names}, head)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
