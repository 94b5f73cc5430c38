r"""Additive float64 sums of products: what all least squares of this package are made of.

The correction of the representation, RegMean and output projection all minimise
:math:`\sum_j \omega_j \|W x_j - y_j\|^2`, of which nothing but these sums is needed.
"""

from contextlib import nullcontext

import torch
from torch import Tensor


def add_products(
    gram: Tensor, cross: Tensor | None, inputs: Tensor, targets: Tensor | None, weighted: Tensor
) -> None:
    r"""Add the products of one batch in place, outside autocast.

    .. math:: G \mathrel{+}= \sum \omega x x^\top, \qquad A \mathrel{+}= \sum \omega y x^\top

    Args:
        gram: G, (d, d) or (g, d, d) for g problems side by side, float64.
        cross: A, (k, d) or (g, k, d); None where there are no targets.
        inputs: x, (n, d) or (g, n, d), float64.
        targets: y, (n, k) or (g, n, k).
        weighted: The inputs times their weights, of the inputs' shape.
    """
    kind = inputs.device.type
    on = torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if on else nullcontext():  # entering it takes long
        multiply = torch.Tensor.addmm_ if inputs.ndim == 2 else torch.Tensor.baddbmm_
        multiply(gram, inputs.mT, weighted)
        if cross is not None:
            assert targets is not None
            multiply(cross, targets.mT, weighted)


def fold_of(indices: Tensor, num_folds: int) -> Tensor:
    """Fold of each sample, from its global index alone.

    Every run of ``num_folds`` consecutive indices (from a multiple of it) is spread over all folds,
    rotated by a hash of the run: folds of a whole set differ by at most one sample, and a set
    sorted by class with any period is still mixed.

    Args:
        indices: Global sample indices, int64 (n,).
        num_folds: Number of folds F.

    Returns:
        int64 (n,), from 0 to F - 1.
    """
    block = torch.div(indices, num_folds, rounding_mode="floor")
    return (indices + (mixed(block) & 0x7FFFFFFFFFFFFFFF) % num_folds) % num_folds


def mixed(values: Tensor) -> Tensor:
    """A hash of int64 numbers, any shape: the finaliser of SplitMix64 after one product."""
    # Products wrap around; shifts are made logical by the masks.
    h = values * -7046029254386353131
    h = (h ^ ((h >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    h = (h ^ ((h >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return h ^ ((h >> 31) & 0x1FFFFFFFF)


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part of matrices (..., d, d)."""
    return (matrix + matrix.mT) / 2
