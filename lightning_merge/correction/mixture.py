"""Maps for weighted mixtures of tasks, in the representation metric."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_merge.correction.fit import TaskFit
from lightning_merge.functional.ridge import ridgeless, solve_right


@dataclass
class HeadRows:
    """Stacked rows of linear heads that read the maps, for a known number of preferences."""

    weight: Tensor
    """H, (R, k)."""
    points: int
    """Preferences that will be asked for."""
    _read: dict[tuple[str, ...], Tensor] = field(default_factory=dict, repr=False)

    def targets(self, fits: Sequence[TaskFit]) -> Tensor | None:
        """H N_t of every task, (T, R, D), if that saves work over the preferences.

        Made once, they spare a product of R k D for every preference, and solve for R rows.
        """
        work = len(self.weight) * len(fits)
        if self.points == 1 or work >= self.weight.shape[1] * self.points:
            return None
        key = tuple(fit.task for fit in fits)
        if key not in self._read:
            self._read[key] = torch.stack([self.weight @ fit.target for fit in fits])
        return self._read[key]


def mixed_maps(
    fits: Sequence[TaskFit],
    weights: Tensor,
    heads: HeadRows | None = None,
) -> Tensor:
    r"""Minimise :math:`\sum_t w_t L_t(W)`: :math:`W = (\sum w_t N_t)(\sum w_t C_t)^{-1}`.

    Args:
        fits: The T tasks, of equal widths.
        weights: (P, T), non-negative, each row with a positive entry.
        heads: Returns ``H W``, solved for in the cheapest order.

    Returns:
        (P, k, D), or (P, R, D) of folded heads.
    """
    assert not any(math.isinf(fit.ridge) for fit in fits)
    # Weights are only a direction: with a largest of one, the sums keep the scale of the data.
    w = weights.to(fits[0].curvature)
    w = w / w.amax(1, keepdim=True)
    curvature = mixed(w, [fit.curvature for fit in fits])
    read = None if heads is None else heads.targets(fits)
    if read is not None:
        return solve_right(mixed(w, list(read)), curvature)
    target = mixed(w, [fit.target for fit in fits])
    if heads is None:
        return solve_right(target, curvature)
    if len(heads.weight) < target.shape[1]:
        return solve_right(heads.weight @ target, curvature)
    return heads.weight @ solve_right(target, curvature)


def mixed(weights: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Weighted sums of matrices, (P, k, D) for weights (P, T)."""
    if len(weights) > 2:
        stack = torch.stack(list(matrices))
        return (weights @ stack.flatten(1)).unflatten(1, stack.shape[1:])
    # For one preference, stacking would move more memory than the sum itself.
    sums = []
    for row in weights.tolist():
        total = row[0] * matrices[0]
        for w, matrix in zip(row[1:], matrices[1:], strict=True):
            total.add_(matrix, alpha=w)
        sums.append(total)
    return torch.stack(sums) if len(sums) > 1 else sums[0][None]


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
    C = mixed(w, [fit.curvature for fit in fits])[0]
    N = mixed(w, [fit.target for fit in fits])[0]
    d = prior.shape[1]
    if C.shape[1] == d:
        return prior if any(infinite) else ridgeless(N, C, prior)
    # A shared bias is eliminated first: moments about the pooled means.
    mean, offset, n = C[:d, d] / C[d, d], N[:, d] / C[d, d], C[d, d]
    gram = C[:d, :d] - n * torch.outer(mean, mean)
    cross = N[:, :d] - n * torch.outer(offset, mean)
    W = prior if any(infinite) else ridgeless(cross, gram, prior)
    return torch.cat([W, (offset - W @ mean)[:, None]], 1)
