"""Maps for weighted mixtures of tasks, in the representation metric."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_merge.correction.fit import TaskFit
from lightning_merge.functional.parallel import map_on_cores
from lightning_merge.functional.ridge import ridgeless, solve_right

TOGETHER = 8
"""Preferences mixed by one product: enough to read the tasks' matrices once for several of them,
few enough that the mixtures stay in the cache until they are factorised."""


@dataclass
class HeadRows:
    """Stacked rows of linear heads that read the maps, kept from query to query."""

    weight: Tensor
    """H, (R, k)."""
    sizes: Sequence[int] = ()
    """Rows of each head, one after another; by default they are one."""
    points: int = 0
    """Preferences that were asked for."""
    decoupled: Any = field(default=None, repr=False)
    """What the head metric keeps for its next query of these rows."""
    _read: dict[str, tuple[TaskFit, Tensor]] = field(default_factory=dict, repr=False)

    def targets(self, fits: Sequence[TaskFit]) -> list[Tensor] | None:
        """H N_t of every task, (R, D) each, once that saves work over the preferences.

        Made once, they spare a product of R k D for every preference, and solve for R rows.
        """
        if len(self.weight) * len(fits) >= self.weight.shape[1] * self.points:
            return None
        for fit in fits:
            if fit.task not in self._read or self._read[fit.task][0] is not fit:
                self._read[fit.task] = fit, self.weight @ fit.target
        return [self._read[fit.task][1] for fit in fits]

    @property
    def memory(self) -> int:
        """Bytes that are kept."""
        return sum(read.nbytes for _, read in self._read.values()) + self.weight.nbytes


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
    read = None if heads is None else heads.targets(fits)
    curvatures = _mixer([fit.curvature for fit in fits], len(w))
    targets = _mixer([fit.target for fit in fits] if read is None else read, len(w))

    def solved(part: Tensor) -> Tensor:
        curvature, target = curvatures(part), targets(part)
        if heads is None or read is not None:
            return solve_right(target, curvature)
        if len(heads.weight) < target.shape[1]:
            return solve_right(heads.weight @ target, curvature)
        return heads.weight @ solve_right(target, curvature)

    parts = w.split(TOGETHER)
    size = fits[0].curvature.numel() if w.device.type == "cpu" else 0
    found = map_on_cores(solved, parts, size=size)
    return torch.cat(found) if len(found) > 1 else found[0]


def mixed(weights: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Weighted sums of matrices, (P, k, D) for weights (P, T)."""
    return _mixer(matrices, len(weights))(weights)


def _mixer(matrices: Sequence[Tensor], points: int) -> Callable[[Tensor], Tensor]:
    if points > 2:
        stack = torch.stack(list(matrices))
        return lambda weights: (weights @ stack.flatten(1)).unflatten(1, stack.shape[1:])

    # For one preference, stacking would move more memory than the sum itself.
    def looped(weights: Tensor) -> Tensor:
        sums = [_sum(row, matrices) for row in weights.tolist()]
        return sums[0][None] if len(sums) == 1 else torch.stack(sums)

    return looped


def _sum(weights: Sequence[float], matrices: Sequence[Tensor]) -> Tensor:
    total = weights[0] * matrices[0]
    for weight, matrix in zip(weights[1:], matrices[1:], strict=True):
        total.add_(matrix, alpha=weight)
    return total


def shared_maps(fits: Sequence[TaskFit], weights: Tensor, heads: HeadRows | None = None) -> Tensor:
    """Maps (P, k, D), or heads times maps, for any ridges, limits included."""
    extreme = any(fit.ridge in (0, math.inf) for fit in fits)
    if extreme and any(needs_limit(_used(fits, row)) for row in weights):
        rows = []
        for row in weights:
            used, w = _used(fits, row), row[row > 0]
            single = limit_map(used, w)[None] if needs_limit(used) else mixed_maps(used, w[None])
            rows.append(single if heads is None else heads.weight @ single)
        return torch.cat(rows)
    return mixed_maps(fits, weights, heads)


def _used(fits: Sequence[TaskFit], weights: Tensor) -> list[TaskFit]:
    return [fit for fit, w in zip(fits, weights.tolist(), strict=True) if w > 0]


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
