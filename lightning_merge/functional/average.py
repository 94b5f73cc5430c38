"""Weighted average of weights (Wortsman et al., ICML 2022, arXiv:2203.05482)."""

import math
from collections.abc import Sequence
from functools import lru_cache, reduce

import torch
from jaxtyping import Float
from torch import Tensor


def average(
    experts: Sequence[Float[Tensor, "*shape"]] | Float[Tensor, "experts *shape"],
    weights: Float[Tensor, " experts"] | Sequence[float],
    out: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    r"""Average one parameter over the experts.

    .. math:: \theta_m = \sum_t w_t\,\theta_t \big/ \sum_t w_t

    The average runs: every expert moves it by its share of the weights so far,
    :math:`m \leftarrow m + \tfrac{w_t}{\sum_{s \le t} w_s}(\theta_t - m)`, so entries in which all
    experts agree are kept bit for bit. It runs in float32 or wider, the dtype of the result, which
    has its own memory.

    Args:
        experts: Fine-tuned values in the caller's order, stacked or in a sequence. One expert
            returns itself.
        weights: Weights of the experts, dimensionless, with a sum that is not zero.
        out: Where to write the result, of the experts' dtype if that is float32 or wider.

    Example:
        >>> average(torch.tensor([[0.0, 2.0], [4.0, 4.0]]), torch.tensor([3.0, 1.0]))
        tensor([1.0000, 2.5000])
    """
    plain = weights.tolist() if isinstance(weights, Tensor) else weights
    return running_average(experts, tuple(plain), out)


def running_average(
    values: Sequence[Tensor] | Tensor, weights: tuple[float, ...], out: Tensor | None = None
) -> Tensor:
    """What :func:`average` computes, from values of any floating-point dtypes."""
    dtype = reduce(torch.promote_types, {value.dtype for value in values}, torch.float32)
    (first, _), *others = _shares(weights)
    total = torch.empty_like(values[0], dtype=dtype) if out is None else out
    if not others:
        return total.copy_(values[0])
    (second, share), *others = others
    torch.lerp(values[first].to(dtype), values[second].to(dtype), share, out=total)
    for t, share in others:
        total.lerp_(values[t] if values[t].dtype == dtype else values[t].to(dtype), share)
    return total


@lru_cache(maxsize=256)
def _shares(weights: tuple[float, ...]) -> tuple[tuple[int, float], ...]:
    """Indices of the weights, in an order, and the share of each among those up to it.

    Weights of the sum's sign come first, so that no sum on the way is zero or crosses it.
    """
    sign = 1.0 if math.fsum(weights) > 0 else -1.0
    order = sorted(range(len(weights)), key=lambda t: sign * weights[t] <= 0)
    sums = [math.fsum(weights[t] for t in order[: k + 1]) for k in range(len(order))]
    return tuple((t, weights[t] / total) for t, total in zip(order, sums, strict=True))
