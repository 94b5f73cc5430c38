"""Start from the backbone of a local checkpoint, whatever wrote it."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_merge.states import LazyStateDict, StateDict

_COMPILED = "_orig_mod."


def load_backbone(network: nn.Module, head: str, path: str | Path) -> None:
    """Copy everything outside the head from a checkpoint into the network, in place.

    Names in the file may stand behind any one prefix (``network.``, ``model.encoder.``), as they
    do when the network was an attribute of a LightningModule. What else the file holds, an old
    head for instance, is not read. Nothing is changed unless all of it fits.

    Args:
        network: The whole network.
        head: Dotted path of its head, whose weights stay as they are.
        path: A ``.safetensors`` file, or a file of ``torch.save``: a state dict, or a Lightning
            checkpoint. Read with ``weights_only=True``, so no code in it is run.

    Raises:
        ValueError: If the file is missing or not readable, or lacks a parameter, or has one of
            another shape.
    """
    found = read_checkpoint(path)
    own = {
        name: tensor
        for name, tensor in network.state_dict().items()
        if not (name == head or name.startswith(f"{head}."))
    }
    prefix = _prefix(found, own)
    missing = [name for name in own if prefix + name not in found]
    wrong = [
        f"'{name}' {tuple(found[prefix + name].shape)} vs {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if prefix + name in found and found[prefix + name].shape != tensor.shape
    ]
    if missing or wrong:
        raise ValueError(
            f"{path} does not hold the backbone of {type(network).__name__}: "
            f"{_listed('missing', missing)}; {_listed('of another shape', wrong)}. Top-level names "
            f"in the file: {', '.join(sorted({name.partition('.')[0] for name in found})[:8])}. "
            "Give the checkpoint of the same architecture, or the model arguments it was made with."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[prefix + name])


def read_checkpoint(path: str | Path) -> StateDict:
    """Tensors of a checkpoint by name, without the marks of ``torch.compile``.

    Raises:
        ValueError: If the file is missing, not readable, holds no tensors, or needs unpickling.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Check the path, or run the fit that writes it.")
    if path.suffix == ".safetensors":
        return LazyStateDict(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds Python objects beside its tensors, and reading those could run code "
            f"({str(error).splitlines()[0]}). Save its state dict alone: "
            "torch.save(module.state_dict(), path), or as safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(
            f"{path} is not a readable checkpoint ({error}): it may be truncated or of another "
            "kind. Write it again."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    tensors = {
        str(name).replace(_COMPILED, ""): tensor
        for name, tensor in state.items()
        if isinstance(tensor, Tensor)
    }
    if not tensors:
        raise ValueError(
            f"{path} holds no tensors; expected a state dict or a Lightning checkpoint."
        )
    return tensors


def _prefix(found: StateDict, own: StateDict) -> str:
    """The prefix under which most of ``own`` is found; of several, the shortest."""
    anchor = next(iter(own), "")
    prefixes = {name.removesuffix(anchor) for name in found if name.endswith(anchor)} | {""}
    return min(prefixes, key=lambda p: (-sum(p + name in found for name in own), len(p), p))


def _listed(what: str, names: list[str]) -> str:
    more = f", … ({len(names) - 5} more)" if len(names) > 5 else ""
    return f"{len(names)} parameters {what}" + (": " + ", ".join(names[:5]) + more if names else "")
