"""Heads that are made, not trained: one safetensors file a task."""

from pathlib import Path

import torch
from torch import nn

from lightning_merge.networks import build_head, get_submodule, set_submodule
from lightning_merge.states import LazyStateDict


def load_fixed_head(network: nn.Module, head: str, path: str | Path) -> None:
    """Put a head from a file in the place of a network's, and keep it from being trained.

    Args:
        network: The whole network, changed in place.
        head: Dotted path of its head.
        path: A safetensors file of the head's own names (``weight``, ``bias``).

    Raises:
        ValueError: If the file is missing, or the head has other names or another number of
            classes or features.
    """
    old = get_submodule(network, head)
    if not Path(path).is_file():
        raise ValueError(
            f"there is no fixed head at {path}. Make the heads first (for CLIP: python -m "
            "lightning_merge.zero_shot), or leave 'heads' out to train them."
        )
    state = LazyStateDict(path)
    found = build_head(old, state)
    wrong = [
        f"'{name}' {tuple(found.state_dict()[name].shape)} vs {tuple(value.shape)}"
        for name, value in old.state_dict().items()
        if name in found.state_dict() and found.state_dict()[name].shape != value.shape
    ]
    if wrong:
        raise ValueError(
            f"{path} does not fit the head '{head}': {', '.join(wrong)} (file vs network). Make "
            "the heads from the same classes and with the same encoder."
        )
    with torch.no_grad():
        for value in found.parameters():
            value.requires_grad_(False)
    set_submodule(network, head, found.to(next(network.parameters()).device))
