"""Fisher-weighted average (Matena and Raffel, NeurIPS 2022, arXiv:2111.09832)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def expected_squares(
    log_probabilities: Float[Tensor, " classes"],
    pull_back: Callable[[Tensor], dict[str, Tensor]],
) -> dict[str, Tensor]:
    r"""Diagonal Fisher information of one sample, exact over its classes (Equation 4).

    .. math:: F_j = \sum_y p(y|x) \left(\partial \log p(y|x) / \partial \theta_j\right)^2

    Args:
        log_probabilities: Logarithms of the predicted probabilities.
        pull_back: Gradients, by parameter, of the sum of the log-probabilities weighted by its
            argument.
    """
    probabilities = log_probabilities.exp()
    total: dict[str, Tensor] = {}
    for label in torch.eye(len(log_probabilities)).to(log_probabilities).unbind():
        probability = (probabilities * label).sum()
        for name, gradient in pull_back(label).items():
            term = probability * gradient.square()
            total[name] = total[name] + term if name in total else term
    return total


def sampled_squares(
    log_probabilities: Float[Tensor, " classes"],
    pull_back: Callable[[Tensor], dict[str, Tensor]],
    uniforms: Float[Tensor, " draws"],
) -> dict[str, Tensor]:
    """Diagonal Fisher information of one sample, from labels drawn from its prediction.

    Args:
        log_probabilities: Logarithms of the predicted probabilities.
        pull_back: As for :func:`expected_squares`.
        uniforms: Numbers in [0, 1), one a label.
    """
    classes = torch.arange(len(log_probabilities), device=log_probabilities.device)
    total: dict[str, Tensor] = {}
    for uniform in uniforms.unbind():
        label = drawn_label(log_probabilities.exp(), uniform)
        for name, gradient in pull_back((classes == label).to(log_probabilities)).items():
            term = gradient.square() / len(uniforms)
            total[name] = total[name] + term if name in total else term
    return total


def drawn_label(probabilities: Float[Tensor, " classes"], uniform: Float[Tensor, ""]) -> Tensor:
    """The class where the cumulative probability passes a number in [0, 1).

    Example:
        >>> drawn_label(torch.tensor([0.2, 0.5, 0.3]), torch.tensor(0.6))
        tensor(1)
    """
    passed = (probabilities.cumsum(0) <= uniform.to(probabilities)).sum()
    return passed.clamp(max=len(probabilities) - 1)


def fisher_terms(
    expert: Float[Tensor, "*shape"],
    fisher: Float[Tensor, "*shape"],
    weight: float,
    epsilon: float,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    r"""What one expert adds to numerator and denominator of the weighted average, in float64.

    .. math:: \theta_j = \sum_t w_t (F_{t,j} + \epsilon)\, \theta_{t,j}
        \Big/ \sum_t w_t (F_{t,j} + \epsilon)

    The quotient of the sums lies between the smallest and the largest expert, entry by entry.

    Args:
        expert: One parameter of the expert.
        fisher: Its Fisher information, non-negative.
        weight: Weight of the expert, non-negative.
        epsilon: Keeps entries that no task uses at the average.
    """
    share = weight * (fisher.double() + epsilon)
    return share * expert.double(), share
