"""Maps for weighted mixtures of tasks, in the representation metric."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_merge.correction.fit import TaskFit
from lightning_merge.functional.ridge import ridgeless, solve_right


def mixed_maps(fits: Sequence[TaskFit], weights: Tensor, heads: Tensor | None = None) -> Tensor:
    r"""Minimise :math:`\sum_t w_t L_t(W)`: :math:`W = (\sum w_t N_t)(\sum w_t C_t)^{-1}`.

    Args:
        fits: The T tasks, of equal widths.
        weights: (P, T), non-negative, each row with a positive entry.
        heads: Read-outs H N_t of the targets, (T, K, D): solves for ``H W`` in K rows only.

    Returns:
        (P, k, D), or (P, K, D) of folded heads.
    """
    assert not any(math.isinf(fit.ridge) for fit in fits)
    targets = torch.stack([fit.target for fit in fits]) if heads is None else heads
    curvatures = torch.stack([fit.curvature for fit in fits])
    w = weights.to(curvatures)
    # Weights are only a direction: with a largest of one, the sums keep the scale of the data.
    w = w / w.amax(1, keepdim=True)
    return solve_right(_mix(w, targets), _mix(w, curvatures))


def needs_limit(fits: Sequence[TaskFit]) -> bool:
    """Whether a mixture of these tasks is a limit: all ridges zero, or one infinite."""
    return all(fit.ridge == 0 for fit in fits) or any(math.isinf(fit.ridge) for fit in fits)


def limit_map(fits: Sequence[TaskFit], weights: Tensor) -> Tensor:
    r"""The map as all ridges go to zero or to infinity, (k, D).

    With :math:`\bar W_0 = \sum w_t u_t W_{0,t} / \sum w_t u_t` over the tasks with an infinite
    ridge (or all), :math:`u_t` the unit of the ridge: an infinite ridge gives :math:`\bar W_0`, a
    vanishing one the least-squares solution nearest to it.

    Args:
        fits: The tasks with positive weight.
        weights: Their weights, (T,).
    """
    infinite = [math.isinf(fit.ridge) for fit in fits]
    bound = infinite if any(infinite) else [True] * len(fits)
    pairs = [
        (float(w) * fit.unit, fit.prior)
        for fit, w, used in zip(fits, weights, bound, strict=True)
        if used
    ]
    prior = torch.stack([u * W0 for u, W0 in pairs]).sum(0) / math.fsum(u for u, _ in pairs)
    w = weights.to(prior)[None]
    C = _mix(w, torch.stack([fit.curvature for fit in fits]))[0]
    N = _mix(w, torch.stack([fit.target for fit in fits]))[0]
    d = prior.shape[1]
    if C.shape[1] == d:
        return prior if any(infinite) else ridgeless(N, C, prior)
    # A shared bias is eliminated first: moments about the pooled means.
    mean, offset, n = C[:d, d] / C[d, d], N[:, d] / C[d, d], C[d, d]
    gram = C[:d, :d] - n * torch.outer(mean, mean)
    cross = N[:, :d] - n * torch.outer(offset, mean)
    W = prior if any(infinite) else ridgeless(cross, gram, prior)
    return torch.cat([W, (offset - W @ mean)[:, None]], 1)


def _mix(weights: Tensor, matrices: Tensor) -> Tensor:
    shape = matrices.shape[1:]
    return (weights @ matrices.flatten(1)).unflatten(1, shape)
