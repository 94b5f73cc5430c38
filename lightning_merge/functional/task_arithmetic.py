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
    dtype = torch.promote_types(base.dtype, torch.float32)
    origin = base.to(dtype)
    task_vectors = experts.to(dtype) - origin
    weights = coefficients.to(dtype).view(-1, *[1] * base.ndim)
    return (origin + (weights * task_vectors).sum(dim=0)).to(base.dtype)
