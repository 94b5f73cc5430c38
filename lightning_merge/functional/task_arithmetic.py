"""Task arithmetic (Ilharco et al., ICLR 2023, arXiv:2212.04089, Section 2)."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_merge.functional.average import running_average


def task_arithmetic(
    base: Float[Tensor, "*shape"],
    experts: Sequence[Float[Tensor, "*shape"]] | Float[Tensor, "experts *shape"],
    coefficients: Float[Tensor, " experts"] | Sequence[float],
    out: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    r"""Add the weighted task vectors of one parameter to its base value.

    .. math:: \theta_m = \theta_0 + \sum_t \lambda_t\,(\theta_t - \theta_0)

    That is the weighted average of base and experts in which the base has the weight
    :math:`1 - \sum_t \lambda_t`, and is computed as such: one pass over each. It runs in float32 or
    wider; the result has the dtype of ``base`` and its own memory. Entries that no expert has
    changed are the base's, bit for bit.

    Args:
        base: Pre-trained value :math:`\theta_0`.
        experts: Fine-tuned values :math:`\theta_t` in the caller's order, stacked or in a sequence.
        coefficients: Weights :math:`\lambda_t`, dimensionless. All zeros return ``base``.
        out: Where to write the result, of the dtype of ``base`` and the experts, float32 or wider.

    Example:
        >>> task_arithmetic(torch.zeros(2), torch.eye(2), torch.tensor([0.5, 0.25]))
        tensor([0.5000, 0.2500])
    """
    weights = coefficients.tolist() if isinstance(coefficients, Tensor) else coefficients
    merged = running_average([base, *experts], (1.0 - math.fsum(weights), *weights), out)
    return merged.to(base.dtype)


def task_vectors_of(
    base: Float[Tensor, "*shape"], experts: Float[Tensor, "experts *shape"]
) -> Float[Tensor, "experts *shape"]:
    """Expert minus base for each expert, in float32 or wider, in new memory.

    The difference is taken after the cast: in half precision most of a small update would be lost.
    """
    dtype = torch.promote_types(torch.promote_types(base.dtype, experts.dtype), torch.float32)
    return experts.to(dtype) - base.to(dtype)


def summed(
    task_vectors: Sequence[Float[Tensor, "*shape"]] | Float[Tensor, "experts *shape"],
) -> Float[Tensor, "*shape"]:
    """Sum of the task vectors in float64, one after the other."""
    total = task_vectors[0].to(torch.float64, copy=True)
    for t in range(1, len(task_vectors)):
        total += task_vectors[t]
    return total


def add_update(
    base: Float[Tensor, "*shape"], update: Float[Tensor, "*shape"], scale: float
) -> Float[Tensor, "*shape"]:
    """Base plus scaled update, cast once to the base's dtype; scale 0 gives the base's bits."""
    return (base.to(update.dtype) + scale * update).to(base.dtype)
