"""Task arithmetic (Ilharco et al., ICLR 2023, arXiv:2212.04089, Section 2)."""

import torch
from jaxtyping import Float
from torch import Tensor


def task_arithmetic(
    base: Float[Tensor, "*shape"],
    experts: Float[Tensor, "experts *shape"],
    coefficients: Float[Tensor, " experts"],
) -> Float[Tensor, "*shape"]:
    r"""Add the weighted task vectors of one parameter to its base value.

    .. math:: \theta_m = \theta_0 + \sum_t \lambda_t\,(\theta_t - \theta_0)

    The sum runs in float32 or wider; the result has the dtype of ``base`` and its own memory.

    Args:
        base: Pre-trained value :math:`\theta_0`.
        experts: Fine-tuned values :math:`\theta_t`, stacked in the caller's order.
        coefficients: Weights :math:`\lambda_t`, dimensionless. All zeros return ``base``.

    Example:
        >>> task_arithmetic(torch.zeros(2), torch.eye(2), torch.tensor([0.5, 0.25]))
        tensor([0.5000, 0.2500])
    """
    task_vectors = task_vectors_of(base, experts)
    weights = coefficients.to(task_vectors.device, task_vectors.dtype)
    update = torch.mv(task_vectors.reshape(len(experts), -1).t(), weights).view(base.shape)
    return (base.to(update.dtype) + update).to(base.dtype)


def task_vectors_of(
    base: Float[Tensor, "*shape"], experts: Float[Tensor, "experts *shape"]
) -> Float[Tensor, "experts *shape"]:
    """Expert minus base for each expert, in float32 or wider, in new memory.

    The difference is taken after the cast: in half precision most of a small update would be lost.
    """
    dtype = torch.promote_types(torch.promote_types(base.dtype, experts.dtype), torch.float32)
    return experts.to(dtype) - base.to(dtype)


def add_update(
    base: Float[Tensor, "*shape"], update: Float[Tensor, "*shape"], scale: float
) -> Float[Tensor, "*shape"]:
    """Base plus scaled update, cast once to the base's dtype; scale 0 gives the base's bits."""
    return (base.to(update.dtype) + scale * update).to(base.dtype)
