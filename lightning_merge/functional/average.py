"""Weighted average of weights (Wortsman et al., ICML 2022, arXiv:2203.05482)."""

import torch
from jaxtyping import Float
from torch import Tensor


def average(
    experts: Float[Tensor, "experts *shape"], weights: Float[Tensor, " experts"]
) -> Float[Tensor, "*shape"]:
    r"""Average one parameter over the experts.

    .. math:: \theta_m = \sum_t w_t\,\theta_t \big/ \sum_t w_t

    The sum runs in float32 or wider, the dtype of the result, which has its own memory.
    Experts that agree in an entry keep it up to rounding.

    Args:
        experts: Fine-tuned values, stacked in the caller's order. One expert returns itself.
        weights: Weights of the experts, dimensionless, with a sum that is not zero.

    Example:
        >>> average(torch.tensor([[0.0, 2.0], [4.0, 4.0]]), torch.tensor([3.0, 1.0]))
        tensor([1.0000, 2.5000])
    """
    dtype = torch.promote_types(experts.dtype, torch.float32)
    shares = (weights.to(torch.float64) / weights.to(torch.float64).sum()).to(dtype)
    flat = experts.to(dtype).reshape(len(experts), -1)
    # (n, T) @ (T,): one pass over the block; the other order is slower by far on the CPU
    return torch.mv(flat.t(), shares.to(flat.device)).view(experts.shape[1:])
