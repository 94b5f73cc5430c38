r"""Small quadratic programmes :math:`\min_\alpha \alpha^\top Q \alpha - 2 c^\top \alpha`.

Over :math:`l \le \alpha \le u`, :math:`\sum \alpha = s`, or any part of these: a batch of many
problems of one size by accelerated projected gradient, a single one by ``daqp`` where it is
installed. No solution leaves unchecked.
"""

import importlib
import importlib.util
import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

FEASIBLE = 1e-9
STATIONARY = 1e-8
MAX_STEPS = 20_000
POLISH_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """Bounds of every coefficient and their sum; ``None`` is no such constraint.

    Non-negative: ``lower=0``. Box: ``lower`` and ``upper``. Simplex: ``lower=0, total=1``.
    """

    lower: float | None = None
    upper: float | None = None
    total: float | None = None

    @property
    def is_free(self) -> bool:
        """Whether nothing is constrained."""
        return self.lower is None and self.upper is None and self.total is None

    @property
    def bounded(self) -> bool:
        """Whether there are bounds beside the sum."""
        return self.lower is not None or self.upper is not None

    def check(self, size: int) -> None:
        """Raise a ``ValueError`` if no vector of this size satisfies the constraint."""
        low, high = self._bounds
        values = [x for x in (self.lower, self.upper, self.total) if x is not None]
        if not all(math.isfinite(x) for x in values):
            raise ValueError(f"{self}: expected finite numbers, or null for no constraint.")
        if low > high:
            raise ValueError(f"infeasible constraints: lower={low} is above upper={high}.")
        if self.total is not None and not size * low <= self.total <= size * high:
            raise ValueError(
                f"infeasible constraints: {size} coefficients between {low} and {high} cannot sum "
                f"to total={self.total}. Change the bounds, or the sum."
            )

    def project(self, points: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch K"]:
        """The nearest feasible points."""
        low, high = self._bounds
        if self.total is None:
            return points.clamp(low, high)
        size = points.shape[-1]
        if not self.bounded:
            return points + (self.total - points.sum(-1, keepdim=True)) / size
        shift = _shift_to_sum(points, low, high, self.total)
        return (points - shift).clamp(low, high)

    def violation(self, points: Float[Tensor, "*batch K"]) -> float:
        """Largest violation of a bound or of the sum."""
        low, high = self._bounds
        worst = max(0.0, float((low - points).max()), float((points - high).max()))
        if self.total is not None:
            worst = max(worst, float((points.sum(-1) - self.total).abs().max()))
        return worst

    @property
    def _bounds(self) -> tuple[float, float]:
        low = -math.inf if self.lower is None else self.lower
        return low, math.inf if self.upper is None else self.upper


def solve_constrained(
    gram: Float[Tensor, "b K K"],
    cross: Float[Tensor, "b K"],
    constraint: Constraint,
    start: Float[Tensor, "b K"],
) -> Float[Tensor, "b K"]:
    """Minimisers of b convex problems; one that is not unique is some minimiser.

    Args:
        gram: Q, positive semi-definite.
        cross: c.
        constraint: The feasible set of every problem.
        start: Where to begin; the objective of a solution is never above that of its projection.

    Raises:
        ValueError: If the set is empty, or a solution does not pass the checks.
    """
    constraint.check(cross.shape[-1])
    if constraint.is_free or not constraint.bounded:
        solution = _free(gram, cross, constraint, start)
    else:
        single = len(cross) == 1
        found = _dense_active_set(gram[0], cross[0], constraint) if single else None
        if found is not None and bool(stationarity(gram, cross, found[None], constraint) <= 1):
            return constraint.project(found[None])
        solution = _projected_gradient(gram, cross, constraint, constraint.project(start))
    residual = float(stationarity(gram, cross, solution, constraint).max())
    violation = constraint.violation(solution)
    scale = 1 + float(solution.abs().max())
    if not violation <= FEASIBLE * scale or not residual <= 1:
        install = "" if daqp_installed() else " (pip install 'lightning-merge[qp]')"
        raise ValueError(
            f"the constrained problem was not solved: violation {violation:.1e}, residual "
            f"{residual:.1e} times the allowed one. Raise the ridge, or install daqp{install}."
        )
    return solution


def stationarity(
    gram: Float[Tensor, "b K K"],
    cross: Float[Tensor, "b K"],
    points: Float[Tensor, "b K"],
    constraint: Constraint,
) -> Float[Tensor, " b"]:
    r"""Residual of the optimality conditions over what is allowed; at most 1 is solved.

    .. math:: \|\alpha - \Pi(\alpha - (Q\alpha - c)/\|Q\|)\| \le 10^{-8} (1 + \|\alpha\|)
    """
    step = (_apply(gram, points) - cross) / _norms(gram)[:, None]
    residual = (points - constraint.project(points - step)).norm(dim=-1)
    return residual / (STATIONARY * (1 + points.norm(dim=-1)))


def daqp_installed() -> bool:
    """Whether the optional solver of single problems is there."""
    return importlib.util.find_spec("daqp") is not None


def _free(gram: Tensor, cross: Tensor, constraint: Constraint, start: Tensor) -> Tensor:
    """Without bounds: a linear system; nearest to the start where it has many solutions."""
    if constraint.total is None:
        from_start = cross - _apply(gram, start)
        return start + _apply(torch.linalg.pinv(gram, hermitian=True), from_start)
    # On the plane of the right sum, around a feasible point.
    size = cross.shape[-1]
    around = constraint.project(start)
    ones = torch.full((size, 1), size**-0.5).to(cross)
    plane = torch.linalg.qr(torch.cat([ones, torch.eye(size).to(cross)], 1))[0][:, 1:]
    reduced = plane.T @ gram @ plane
    right = (cross - _apply(gram, around)) @ plane
    return around + _apply(torch.linalg.pinv(reduced, hermitian=True), right) @ plane.T


def _dense_active_set(gram: Tensor, cross: Tensor, constraint: Constraint) -> Tensor | None:
    if not daqp_installed():
        return None
    daqp = importlib.import_module("daqp")
    size = len(cross)
    scale = float(gram.diagonal().max())
    if not scale > 0:
        return None
    unbounded = 1e30
    low, high = constraint._bounds
    upper, lower = [min(high, unbounded)] * size, [max(low, -unbounded)] * size
    sense, rows = [0] * size, np.zeros((0, size))
    if constraint.total is not None:
        upper, lower = [*upper, constraint.total], [*lower, constraint.total]
        sense, rows = [*sense, 5], np.ones((1, size))  # 5: an equality, always active
    solution, _, flag, _ = daqp.solve(
        np.ascontiguousarray((gram / scale).cpu().numpy()),
        np.ascontiguousarray((-cross / scale).cpu().numpy()),
        rows,
        np.array(upper, dtype=float),
        np.array(lower, dtype=float),
        np.array(sense, dtype=np.int32),
        primal_tol=1e-12,
        dual_tol=1e-13,
    )
    return torch.as_tensor(solution).to(cross) if flag > 0 else None


def _projected_gradient(
    gram: Tensor, cross: Tensor, constraint: Constraint, start: Tensor
) -> Tensor:
    """Accelerated, restarted where the gradient disagrees, and polished on the active set."""
    step = (1 / _norms(gram))[:, None]
    point = best = start
    ahead, momentum = start, torch.ones(len(start), 1).to(start)
    for count in range(1, MAX_STEPS + 1):
        new = constraint.project(ahead - step * (_apply(gram, ahead) - cross))
        restart = ((ahead - new) * (new - point)).sum(-1, keepdim=True) > 0
        following = torch.where(restart, 1.0, (1 + (1 + 4 * momentum.square()).sqrt()) / 2)
        factor = torch.where(restart, 0.0, (momentum - 1) / following)
        ahead, point, momentum = new + factor * (new - point), new, following
        if count % POLISH_EVERY == 0:
            best = _better(gram, cross, point, _polished(gram, cross, point, constraint))
            if bool((stationarity(gram, cross, best, constraint) <= 1).all()):
                return best
    return best


def _polished(gram: Tensor, cross: Tensor, point: Tensor, constraint: Constraint) -> Tensor:
    """The minimiser with the same coefficients at their bounds, projected."""
    low, high = constraint._bounds
    bound = (point <= low + 1e-12) | (point >= high - 1e-12)
    free = (~bound).to(gram)
    fixed = torch.where(bound, point, 0.0)
    right = torch.where(bound, 0.0, cross - _apply(gram, fixed))
    masked = gram * free[:, :, None] * free[:, None, :]
    if constraint.total is None:
        moved = _apply(torch.linalg.pinv(masked, hermitian=True), right)
        return constraint.project(fixed + moved * free)
    # Bordered system of the sum over the free coefficients.
    scale = _norms(gram)[:, None]
    corner = torch.zeros(len(gram), 1, 1).to(gram)
    top = torch.cat([masked / scale[:, :, None], free[:, :, None]], 2)
    bordered = torch.cat([top, torch.cat([free[:, None, :], corner], 2)], 1)
    missing = constraint.total - fixed.sum(-1, keepdim=True)
    right = torch.cat([right / scale, missing], 1)
    moved = _apply(torch.linalg.pinv(bordered, hermitian=True), right)[:, :-1]
    return constraint.project(fixed + moved * free)


def _better(gram: Tensor, cross: Tensor, first: Tensor, second: Tensor) -> Tensor:
    def value(points: Tensor) -> Tensor:
        return ((_apply(gram, points) - 2 * cross) * points).sum(-1, keepdim=True)

    return torch.where(value(second) <= value(first), second, first)


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors[..., None])[..., 0]


def _norms(gram: Tensor) -> Tensor:
    top = torch.linalg.eigvalsh(gram)[..., -1]
    return torch.where(top > 0, top, 1.0)


def _shift_to_sum(points: Tensor, low: float, high: float, total: float) -> Tensor:
    """The shift after which clamped points sum to the total: bisection, then exactly."""
    size = points.shape[-1]
    reach = abs(total) / size + 1.0
    bounds = [abs(x) for x in (low, high) if math.isfinite(x)]
    reach += max(bounds, default=0.0)
    down = points.amin(-1, keepdim=True) - reach * size
    up = points.amax(-1, keepdim=True) + reach * size
    for _ in range(60):
        middle = (down + up) / 2
        above = (points - middle).clamp(low, high).sum(-1, keepdim=True) > total
        down, up = torch.where(above, middle, down), torch.where(above, up, middle)
    shift = (down + up) / 2
    moved = points - shift
    free = (moved > low) & (moved < high)
    fixed = torch.where(free, 0.0, moved.clamp(low, high)).sum(-1, keepdim=True)
    count = free.sum(-1, keepdim=True)
    inside = torch.where(free, points, 0.0).sum(-1, keepdim=True)
    return torch.where(count > 0, (inside + fixed - total) / count.clamp_min(1), shift)
