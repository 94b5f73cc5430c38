"""DELLA: keep probabilities by rank of magnitude (Deep et al., 2024, arXiv:2406.11617)."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def keep_probabilities(
    task_vector: Float[Tensor, "*shape"], density: float, epsilon: float
) -> Float[Tensor, "*shape"]:
    r"""Probability of each entry to be kept: linear in the rank of its magnitude within its row.

    .. math:: p_{(i)} = d - \epsilon + 2\epsilon\,\frac{i}{n-1},\quad i = 0 \dots n-1

    from the smallest to the largest; equal magnitudes rank by index. Rows are those of
    ``reshape(out, -1)``; a vector is one row, and a row of one entry has probability ``density``.

    Args:
        task_vector: One expert's task vector of one parameter.
        density: Mean probability :math:`d`, in (0, 1].
        epsilon: Half-width of the range, with ``0 < density - epsilon`` and
            ``density + epsilon <= 1`` (the paper's epsilon is the full width).

    Example:
        >>> keep_probabilities(torch.tensor([[3.0, -1.0, 2.0]]), density=0.5, epsilon=0.1)
        tensor([[0.6000, 0.4000, 0.5000]])
    """
    matrix = rows_of(task_vector)
    size = matrix.shape[1]
    if size < 2 or matrix.numel() == 0:
        return torch.full_like(task_vector, density)
    order = _ranked(matrix.abs())
    ladder = torch.linspace(density - epsilon, density + epsilon, size).to(matrix)
    probabilities = torch.empty_like(matrix).scatter_(1, order, ladder.expand_as(matrix))
    return probabilities.view(task_vector.shape)


def _ranked(magnitudes: Tensor) -> Tensor:
    """Indices of each row in ascending order, the lower index first among equals."""
    if magnitudes.dtype != torch.float32:
        return magnitudes.argsort(dim=1, stable=True)
    # Bits of a float32 that is not negative order as the number does. With the index below them
    # every key differs, so that a plain sort is stable; it is several times as fast as argsort.
    keys = (magnitudes.view(torch.int32).long() << 32) | torch.arange(
        magnitudes.shape[1], device=magnitudes.device
    )
    if keys.device.type != "cpu":
        return keys.sort(dim=1).values & 0xFFFFFFFF
    return torch.from_numpy(np.sort(keys.numpy(), axis=1)) & 0xFFFFFFFF


def rows_of(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "rows columns"]:
    """A parameter as a matrix with one row for each output; a vector or a number is one row."""
    if tensor.ndim < 2:
        return tensor.reshape(1, -1)
    return tensor.reshape(tensor.shape[0], tensor[0].numel() if len(tensor) else 0)
