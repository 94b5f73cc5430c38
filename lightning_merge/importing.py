"""Experts that exist already: from checkpoint files and folders into a pool, without training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge.checkpoints import read_checkpoint, timm_model, under_prefix
from lightning_merge.networks import load_backbone, split_state
from lightning_merge.pool import ExpertPool, build_network


def open_pool(
    path: str | Path,
    head: str | None,
    base: str | Path | None,
    model: Mapping[str, Any] | None = None,
) -> ExpertPool:
    """Open a pool, or create it from a checkpoint of the base.

    Args:
        path: Folder of the pool.
        head: Dotted path of the head; needed to create a pool.
        base: Checkpoint file or folder of the base; needed to create a pool, and checked against
            one that exists.
        model: How to build the network, ``{class_path, init_args}``; a timm folder knows by itself.

    Raises:
        ValueError: If there is no pool and no base or head, or the pool has another base or head.
    """
    path = Path(path)
    if base is None:
        if not (path / "pool.json").exists():
            raise ValueError(
                f"{path} is no expert pool yet: give base=..., the checkpoint that the experts "
                "were fine-tuned from (on the command line --base), and the head's dotted path."
            )
        pool = ExpertPool.open(path)
        if head is not None and head != pool.head:
            raise ValueError(f"{path} has the head '{pool.head}', found '{head}'. Leave it out.")
        return pool
    if head is None:
        raise ValueError(
            "a pool needs the dotted path of the head in the network, such as 'fc' or "
            "'classifier': give head=..., on the command line --head."
        )
    spec = dict(model) if model is not None else timm_model(base)
    network = base_network(read_checkpoint(base, stand_ins=True), head, spec, str(base))
    return ExpertPool.create(path, network, head, model=spec, exist_ok=True)


def base_network(
    state: Mapping[str, Tensor], head: str, model: Mapping[str, Any] | None, source: str
) -> nn.Module:
    """A network that holds a base's weights: built where it is known how, else an empty shell.

    Args:
        state: The base's tensors, under any prefix.
        head: Dotted path of the head in the network.
        model: How to build the network, if that is known.
        source: What the state is, for errors.

    Raises:
        ValueError: If the state has no such head, or does not fit the network.
    """
    if model is not None:
        network = build_network(model)
        names = list(split_state(network, head)[0])
        _, inside = under_prefix(state, names, source)
        load_backbone(network, {name: inside[name] for name in names}, head)
        return network
    ends = (f"{head}.", f".{head}.")
    anchors = [name for name in state if name.startswith(ends[0]) or ends[1] in name]
    if not anchors:
        layers = [name.removesuffix(".weight") for name in state if state[name].ndim == 2]
        raise ValueError(
            f"{source} has no parameters below the head '{head}'. Its matrices, last first: "
            f"{', '.join(reversed(layers[-8:])) or 'none'}. Give the head's dotted path, without "
            "what a LightningModule puts before it; for a base without a head give model=..."
        )
    shortest = min(anchors, key=len)
    prefix = "" if shortest.startswith(ends[0]) else shortest[: shortest.index(ends[1]) + 1]
    return shell(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, head
    )


def calibration_file(path: str | Path) -> dict[str, Tensor]:
    """Unlabeled inputs of a ``.safetensors`` or ``.pt`` file: ``inputs``, or named tensors."""
    return dict(read_checkpoint(path))


class _Shell(nn.Module):
    """Parameters in the places that their names say, with nothing to compute."""


def shell(state: Mapping[str, Tensor], head: str) -> nn.Module:
    """A module with a state's names and values and nothing to compute; the head has its layers."""
    root = _Shell()
    for name, value in state.items():
        *parents, leaf = name.split(".")
        owner: nn.Module = root
        for part in parents:
            if part not in owner._modules:
                owner.add_module(part, _Shell())
            owner = owner.get_submodule(part)
        owner.register_buffer(leaf, value)
    _mark_linear(root, head)
    return root


def _mark_linear(root: nn.Module, head: str) -> None:
    """Turn the head's matrices into linear layers, which a head must have."""
    for name, module in list(root.named_modules()):
        inside = name == head or name.startswith(f"{head}.")
        weight = module._buffers.get("weight")
        if not inside or weight is None or weight.ndim != 2:
            continue
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in module._buffers)
        layer.load_state_dict({k: v for k, v in module._buffers.items() if v is not None})
        layer.to(torch.empty(0, dtype=weight.dtype))
        parent, _, leaf = name.rpartition(".")
        root.get_submodule(parent)._modules[leaf] = layer
