"""Which points of a set are Pareto-optimal, and the volume that they dominate."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

EXACT_UP_TO = 5
"""Most tasks for which the hypervolume is computed exactly: the cost grows steeply beyond."""

_REPLICATES = 16
_SAMPLES = 16_384
_OPERATIONS = 800_000_000  # about two seconds; large fronts of many tasks get fewer directions
_CHUNK = 8_000_000  # comparisons held at a time: about 8 MB of booleans


def pareto_mask(values: Float[Tensor, "P T"], maximize: bool = True) -> Bool[Tensor, " P"]:
    """True for the points that no other point dominates.

    A point dominates another if it is at least as good on every task and better on one. Equal
    points do not dominate each other, so all copies of an optimal point are kept.

    Args:
        values: One row for each point, one column for each task.
        maximize: Whether larger is better, for all tasks.

    Example:
        >>> pareto_mask(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.5]]))
        tensor([ True,  True, False])
    """
    check_values("values", values)
    points = values if maximize else -values
    rows = max(1, _CHUNK // max(1, points.numel()))
    return torch.cat([~_dominated(chunk, points) for chunk in points.split(rows)])


def _dominated(chunk: Tensor, points: Tensor) -> Tensor:
    """Whether each of ``(R, T)`` rows is dominated by one of the ``(P, T)`` points: ``(R,)``."""
    others, mine = points.unsqueeze(0), chunk.unsqueeze(1)
    at_least = (others >= mine).all(dim=2)
    better = (others > mine).any(dim=2)
    return (at_least & better).any(dim=1)


@dataclass(frozen=True)
class HypervolumeEstimate:
    """A hypervolume and how it was found."""

    value: float
    """The volume, in the product of the units of the values."""
    error: float
    """Standard error of ``value``; 0 where it is exact."""
    method: str
    """``"exact"`` or ``"monte-carlo"``."""
    reference: tuple[float, ...]
    """The reference point, one number for each task."""


def hypervolume(
    values: Float[Tensor, "P T"],
    reference: float | Sequence[float] = 0.0,
    *,
    maximize: bool = True,
    seed: int = 0,
) -> HypervolumeEstimate:
    r"""Lebesgue measure of what the points dominate, down to the reference point.

    .. math:: \mathrm{HV}(A) = \mathrm{vol}\Big(\bigcup_{a\in A}\prod_t [r_t, a_t]\Big)

    Points worse than the reference on a task are clipped to it, so they add nothing. Exact for up
    to 5 tasks. From 6 on: the mean of 16 Monte-Carlo estimates of the line integral of Deng and
    Zhang (IEEE TEVC 2019) with up to 16,384 directions each, from the given seed, and its standard
    error.
    A box (one undominated point) is exact for any number of tasks. Computed by ``moocore``.

    Args:
        values: One row for each point, at least one.
        reference: The worst point that counts, for all tasks or for each.
        maximize: Whether larger is better; otherwise the reference is an upper bound.
        seed: Seed of the estimates.

    Example:
        >>> hypervolume(torch.tensor([[0.5, 1.0], [1.0, 0.5]])).value
        0.75
    """
    import moocore

    check_values("values", values)
    origin = torch.as_tensor(reference, dtype=torch.float64).flatten()
    if origin.numel() not in (1, values.shape[1]):
        raise ValueError(
            f"the reference point has {origin.numel()} numbers, expected 1 or {values.shape[1]}: "
            "one for each task."
        )
    origin = origin.expand(values.shape[1])
    points = values.detach().cpu().double()
    gains = points - origin if maximize else origin - points
    gains = torch.unique(gains.clamp(min=0), dim=0)
    front = gains[pareto_mask(gains)].numpy()
    value, error, method = 0.0, 0.0, "exact"
    if len(front) == 1:
        value = float(front.prod())
    elif front.shape[1] <= EXACT_UP_TO:
        value = float(moocore.hypervolume(front, ref=0.0, maximise=True))
    else:
        directions = max(1024, min(_SAMPLES, _OPERATIONS // (_REPLICATES * front.size)))
        estimates = torch.tensor(
            [
                moocore.hv_approx(
                    front,
                    ref=0.0,
                    maximise=True,
                    nsamples=directions,
                    seed=seed * _REPLICATES + replicate,
                    method="DZ2019-MC",
                )
                for replicate in range(_REPLICATES)
            ],
            dtype=torch.float64,
        )
        value, method = float(estimates.mean()), "monte-carlo"
        error = float(estimates.std() / _REPLICATES**0.5)
    return HypervolumeEstimate(value, error, method, tuple(origin.tolist()))


def check_values(name: str, values: Tensor) -> None:
    """Raise a ``ValueError`` unless ``values`` is a non-empty, finite ``(P, T)`` matrix."""
    if values.ndim != 2 or values.numel() == 0:
        raise ValueError(
            f"{name} must be a non-empty matrix (points, tasks), found shape {tuple(values.shape)}."
        )
    if not bool(torch.isfinite(values).all()):
        row, column = torch.nonzero(~torch.isfinite(values))[0].tolist()
        raise ValueError(
            f"{name} holds a non-finite number at point {row}, task {column}: "
            f"{float(values[row, column])}. Leave out the point, or evaluate it again."
        )
