"""AdaMerging (Yang et al., ICLR 2024, arXiv:2310.02575): learned coefficients of task vectors.

The merged weights are affine in the coefficients, so the gradient of any loss with respect to a
coefficient is the inner product of its gradient with respect to the weights with the task vector:
no graph through the merge is needed.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Granularity: TypeAlias = Literal["task", "block", "tensor"]


def entropy(logits: Float[Tensor, "samples classes"]) -> Float[Tensor, " samples"]:
    r"""Shannon entropy of every prediction, in nats, in float32 or wider (Section 3.2.2).

    .. math:: H(p) = -\sum_c p_c \log p_c, \quad 0 \le H \le \log C

    From the log-softmax, whose gradient is exact for confident predictions too; the logarithm of
    ``p`` plus a small number, as in some implementations, has a biased one.

    Example:
        >>> entropy(torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
        tensor([0.6931, 0.3653])
    """
    scores = _wide(logits).log_softmax(1)
    return -(scores.exp() * scores).sum(1)


def divergence(
    logits: Float[Tensor, "samples classes"], expert: Float[Tensor, "samples classes"]
) -> Float[Tensor, " samples"]:
    """Kullback-Leibler divergence of the merged predictions from the expert's, in nats.

    Zero where the merged model predicts what the expert does. Not of the paper: the experts are
    there, so their own predictions are a better signal than confidence alone.

    Args:
        logits: Of the merged model.
        expert: Of the task's own expert on the same samples; no gradient flows to them.
    """
    ours, theirs = _wide(logits).log_softmax(1), _wide(expert).log_softmax(1)
    return (theirs.exp() * (theirs - ours)).sum(1)


def combination(
    origin: Float[Tensor, " entries"],
    task_vectors: Float[Tensor, "tasks entries"],
    coefficients: Float[Tensor, " tasks"],
) -> Float[Tensor, " entries"]:
    r"""Merged weights of one group, flat: Equation 3.

    .. math:: \theta = \theta_0 + \sum_k \lambda_k \tau_k

    Example:
        >>> combination(torch.zeros(2), torch.eye(2), torch.tensor([0.5, 0.25]))
        tensor([0.5000, 0.2500])
    """
    return torch.addmv(origin, task_vectors.T, coefficients.to(task_vectors))


def contraction(
    gradient: Float[Tensor, " entries"], task_vectors: Float[Tensor, "tasks entries"]
) -> Float[Tensor, " tasks"]:
    r"""Gradient with respect to the coefficients, from that with respect to the weights.

    .. math:: \partial L / \partial \lambda_k = \langle \partial L / \partial \theta, \tau_k \rangle

    In float64; exact, because the weights are affine in the coefficients.
    """
    return (task_vectors @ gradient.to(task_vectors)).double()


def agreeing(
    trimmed: Float[Tensor, "tasks *shape"], signs: Float[Tensor, "*shape"]
) -> Float[Tensor, "tasks *shape"]:
    """Zero the entries of trimmed task vectors without the elected sign (AdaMerging++).

    Example:
        >>> agreeing(torch.tensor([[2.0, -1.0], [-3.0, -1.0]]), torch.tensor([-1.0, -1.0]))
        tensor([[ 0., -1.],
                [-3., -1.]])
    """
    return torch.where(trimmed.sign() == signs, trimmed, 0.0)


def group_of(name: str, granularity: Granularity) -> str:
    """Group of parameters that share one coefficient a task.

    A tensor is a group of its own (the paper's layer-wise AdaMerging), all are one (task-wise), or
    a block: the name up to its last number, or up to the first dot where it has none.

    Example:
        >>> group_of("blocks.0.attn.qkv.weight", "block"), group_of("norm.weight", "block")
        ('blocks.0', 'norm')
    """
    if granularity == "tensor":
        return name
    if granularity == "task":
        return "all"
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1 if numbers else 1])


def projected(
    coefficients: Float[Tensor, "groups tasks"], bounds: Sequence[float] | None
) -> Float[Tensor, "groups tasks"]:
    """Coefficients moved to the nearest point within the bounds.

    Applied after a step, unlike a clamp inside the forward pass, whose gradient is zero outside:
    a coefficient that it once stops never moves again.
    """
    return coefficients if bounds is None else coefficients.clamp(bounds[0], bounds[1])


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
