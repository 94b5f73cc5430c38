"""Some of many samples, evenly spread."""

import torch
from torch import Tensor


def evenly_spread(size: int, number: int | None) -> Tensor:
    """Row numbers of at most ``number`` among ``size`` samples, int64, ascending; None takes all.

    Evenly spread, so that sets sorted by class keep all classes.
    """
    chosen = size if number is None else min(size, number)
    return torch.arange(chosen) * size // max(chosen, 1)
