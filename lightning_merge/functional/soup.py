"""Greedy soup (Wortsman et al., ICML 2022, arXiv:2203.05482, Recipe 1)."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def greedy_members(
    scores: Mapping[str, float], score_with: Callable[[Sequence[str], str], float]
) -> tuple[list[str], list[tuple[str, float, bool]]]:
    """Choose what goes into the soup: best first, each that does not lower the score.

    Args:
        scores: Score of every candidate alone, higher is better; of equals the first one goes
            first.
        score_with: Score of the average of members (the first argument) and one more (the second).

    Returns:
        The members in the order they were added, and every trial as ``(candidate, score of the
        soup with it, whether it was added)``. The score of the soup is never below that of the
        best candidate.

    Example:
        >>> greedy_members({"a": 0.5, "b": 0.7}, lambda members, one: 0.8)[0]
        ['b', 'a']
    """
    first, *others = sorted(scores, key=lambda name: -scores[name])
    members, best = [first], scores[first]
    trace = [(first, best, True)]
    for candidate in others:
        score = score_with(members, candidate)
        added = score >= best
        trace.append((candidate, score, added))
        if added:
            members.append(candidate)
            best = score
    return members, trace


def mean_with(
    total: Float[Tensor, "*shape"], number: int, value: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """The mean of one value more than a float64 sum of ``number`` values has, in float64.

    Example:
        >>> mean_with(torch.tensor([3.0, 5.0]).double(), 2, torch.tensor([3.0, 1.0]))
        tensor([2., 2.], dtype=torch.float64)
    """
    return (total + value.double()) / (number + 1)


def agreement(
    ours: Float[Tensor, "samples classes"], theirs: Float[Tensor, "samples classes"]
) -> Float[Tensor, ""]:
    """How many samples two networks put into the same class, in float64.

    Example:
        >>> agreement(torch.eye(2), torch.ones(2, 2))
        tensor(1., dtype=torch.float64)
    """
    return (ours.argmax(1) == theirs.argmax(1)).sum().to(torch.float64)
