"""Weighted average of weights (Wortsman et al., ICML 2022, arXiv:2203.05482)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def average(
    experts: Sequence[Float[Tensor, "*shape"]] | Float[Tensor, "experts *shape"],
    weights: Float[Tensor, " experts"],
    out: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    r"""Average one parameter over the experts.

    .. math:: \theta_m = \sum_t w_t\,\theta_t \big/ \sum_t w_t

    The sum runs in float32 or wider, the dtype of the result, which has its own memory.
    Experts that agree in an entry keep it up to rounding.

    Args:
        experts: Fine-tuned values in the caller's order, stacked or in a sequence. One expert
            returns itself.
        weights: Weights of the experts, dimensionless, with a sum that is not zero.
        out: Where to write the result, of the experts' dtype if that is float32 or wider.

    Example:
        >>> average(torch.tensor([[0.0, 2.0], [4.0, 4.0]]), torch.tensor([3.0, 1.0]))
        tensor([1.0000, 2.5000])
    """
    dtype = torch.promote_types(experts[0].dtype, torch.float32)
    shares = (weights.double() / weights.double().sum()).tolist()
    total = torch.mul(experts[0].to(dtype), shares[0], out=out)
    for expert, share in zip(experts[1:], shares[1:], strict=True):
        total.add_(expert.to(dtype), alpha=share)
    return total
