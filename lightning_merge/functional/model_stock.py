"""Model Stock: how far to go from the base to the average (Jang et al., ECCV 2024, 2403.19522)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_merge.functional.task_arithmetic import task_vectors_of


def model_stock(
    base: Float[Tensor, "rows columns"],
    experts: Float[Tensor, "experts rows columns"],
    pair_mean: Literal["cos", "angle"] = "cos",
) -> Float[Tensor, "rows columns"]:
    r"""Interpolate each row between the base and the experts' average (Equation 5).

    .. math:: \theta = r\,\bar\theta + (1-r)\,\theta_0,\quad r = \frac{T c}{1 + (T-1)\,c}

    where *c* is the mean cosine between the task vectors of two experts, clipped to [0, 1]: the
    published code clips to [-1, 1], where *r* grows without bound near ``-1 / (T - 1)``. A task
    vector of zero has cosine 0 to every other.

    Args:
        base: Pre-trained value; every row gets a ratio of its own.
        experts: At least two fine-tuned values.
        pair_mean: Average the cosines of all pairs, or their angles.

    Example:
        >>> base, experts = torch.zeros(1, 2), torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> model_stock(base, experts)  # orthogonal: stay
        tensor([[0., 0.]])
    """
    task_vectors = task_vectors_of(base, experts)
    ratios = interpolation_ratio(task_vectors, pair_mean).to(task_vectors.dtype)
    return (base.to(task_vectors.dtype) + ratios * task_vectors.mean(dim=0)).to(base.dtype)


def interpolation_ratio(
    task_vectors: Float[Tensor, "experts rows columns"], pair_mean: Literal["cos", "angle"] = "cos"
) -> Float[Tensor, "rows 1"]:
    """Ratio *r* of :func:`model_stock` for each row, in [0, 1], in float64."""
    num_experts = len(task_vectors)
    by_row = task_vectors.double().transpose(0, 1)
    gram = by_row @ by_row.transpose(1, 2)
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    scale = norms[:, :, None] * norms[:, None, :]
    cosines = torch.where(scale > 0, gram / scale, 0.0).clamp(-1, 1)
    first, second = torch.triu_indices(num_experts, num_experts, offset=1, device=gram.device)
    pairs = cosines[:, first, second]
    mean = pairs.mean(dim=1) if pair_mean == "cos" else pairs.arccos().mean(dim=1).cos()
    mean = mean.clamp(0, 1)[:, None]
    return num_experts * mean / (1 + (num_experts - 1) * mean)
