"""Preference grids: finite sets of points on the simplex of task weights.

Every function returns a float64 tensor of shape ``(P, T)``: non-negative rows that sum to one
(within 1e-15), in a fixed order, without duplicates. Lattices are integers divided once, never
differences, so that 0 and 1 are exact.
"""

import itertools
import math

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

MAX_LATTICE_POINTS = 1_000_000
"""Largest lattice that :func:`das_dennis` builds: more than anybody evaluates by intent."""


def equal(num_tasks: int) -> Float64[Tensor, "1 T"]:
    """The preference that weighs all tasks alike, as one row.

    Example:
        >>> equal(4)
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]], dtype=torch.float64)
    """
    _check_tasks(num_tasks)
    return torch.full((1, num_tasks), 1.0 / num_tasks, dtype=torch.float64)


def one_hot(num_tasks: int, task: int | None = None) -> Float64[Tensor, "P T"]:
    """The corners of the simplex: one task alone counts.

    Args:
        num_tasks: Number of tasks ``T``.
        task: Index of the one task; ``None`` gives all ``T`` corners in task order.

    Example:
        >>> one_hot(2)
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    return priority(num_tasks, task, weight=1.0)


def priority(
    num_tasks: int, task: int | None = None, *, weight: float = 0.5
) -> Float64[Tensor, "P T"]:
    """One favoured task has the given weight, the others share the rest equally.

    Args:
        num_tasks: Number of tasks ``T``. A single task has weight one.
        task: Index of the favoured task; ``None`` gives one row for each task in turn.
        weight: Weight ρ of the favoured task, in [0, 1]. The papers do not publish theirs.

    Example:
        >>> priority(3, 0)
        tensor([[0.5000, 0.2500, 0.2500]], dtype=torch.float64)
    """
    _check_tasks(num_tasks)
    _check_unit("weight", weight)
    favoured = range(num_tasks) if task is None else [_check_index("task", task, num_tasks)]
    return without_duplicates(torch.stack([_favour(num_tasks, t, weight) for t in favoured]))


def response(num_tasks: int, task: int, num_points: int = 11) -> Float64[Tensor, "P T"]:
    """The path on which one task's weight rises from 0 to 1; the others share the rest equally.

    Args:
        num_tasks: Number of tasks ``T``.
        task: Index of the rising task.
        num_points: Points on the path, both ends included; at least 2.

    Example:
        >>> response(3, 1, 3)
        tensor([[0.5000, 0.0000, 0.5000],
                [0.2500, 0.5000, 0.2500],
                [0.0000, 1.0000, 0.0000]], dtype=torch.float64)
    """
    _check_tasks(num_tasks)
    _check_index("task", task, num_tasks)
    _check_count("num_points", num_points, 2)
    steps = num_points - 1
    return without_duplicates(
        torch.stack([_favour(num_tasks, task, step / steps) for step in range(num_points)])
    )


def pairwise(
    num_tasks: int, first: int, second: int, num_points: int = 11, *, floor: float = 0.0
) -> Float64[Tensor, "P T"]:
    """The edge between two corners, from ``first`` alone to ``second`` alone.

    Args:
        num_tasks: Number of tasks ``T``, at least 2.
        first: Index of the task whose weight falls from 1.
        second: Index of the task whose weight rises to 1.
        num_points: Points on the edge, both ends included; at least 2.
        floor: Total weight ε in [0, 1) spread over all tasks, ``ε/T`` each, so that no task has
            none. 0 is the edge itself.

    Example:
        >>> pairwise(3, 0, 2, 3)
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 0.0000, 0.5000],
                [0.0000, 0.0000, 1.0000]], dtype=torch.float64)
    """
    _check_tasks(num_tasks, at_least=2)
    _check_index("first", first, num_tasks)
    _check_index("second", second, num_tasks)
    if first == second:
        raise ValueError(f"first and second are both {first}: a pair needs two different tasks.")
    _check_count("num_points", num_points, 2)
    steps = torch.arange(num_points, dtype=torch.float64)
    points = torch.zeros(num_points, num_tasks, dtype=torch.float64)
    points[:, second] = steps / (num_points - 1)
    points[:, first] = steps.flip(0) / (num_points - 1)
    return interior(points, floor / num_tasks)


def das_dennis(
    num_tasks: int, divisions: int, *, inner: int = 0, epsilon: float = 0.0
) -> Float64[Tensor, "P T"]:
    """The simplex lattice of Das and Dennis: all ``i / H`` with integers ``i`` summing to ``H``.

    It has ``C(H + T - 1, T - 1)`` points in lexicographic order (Das & Dennis, SIAM J. Optim.
    1998). With ``H < T`` all of them lie on the boundary: add an inner layer, or ``epsilon``.

    Args:
        num_tasks: Number of tasks ``T``.
        divisions: ``H``, at least 1.
        inner: Divisions of a second lattice, shrunk half-way to the centre and appended; 0 = none.
        epsilon: Smallest weight of any task, see :func:`interior`.

    Raises:
        ValueError: If an argument is out of range, or the lattice has over a million points.

    Example:
        >>> das_dennis(3, 12).shape, das_dennis(8, 3).shape
        (torch.Size([91, 3]), torch.Size([120, 8]))
    """
    _check_tasks(num_tasks)
    _check_count("divisions", divisions, 1)
    _check_count("inner", inner, 0)
    points = _compositions(num_tasks, divisions) / divisions
    if inner:
        # (i/H + 1/T) / 2 as one fraction: an exact integer divided once
        counts = _compositions(num_tasks, inner)
        shrunk = (counts * num_tasks + inner) / (2.0 * inner * num_tasks)
        points = torch.cat([points, shrunk])
    return interior(points, epsilon)


def dirichlet(
    num_tasks: int, num_points: int, *, concentration: float = 1.0, seed: int = 0
) -> Float64[Tensor, "P T"]:
    """Random preferences from a symmetric Dirichlet distribution, the same for the same seed.

    Args:
        num_tasks: Number of tasks ``T``.
        num_points: Number of draws ``P``.
        concentration: α of every task, above 0; 1 is uniform on the simplex, less goes to corners.
        seed: Seed of the draws; the global generators are not touched.
    """
    _check_tasks(num_tasks)
    _check_count("num_points", num_points, 1)
    if not (math.isfinite(concentration) and concentration > 0):
        raise ValueError(f"concentration must be a finite number above 0, found {concentration}.")
    draws = np.random.default_rng(seed).dirichlet([concentration] * num_tasks, num_points)
    points = torch.from_numpy(draws)
    return without_duplicates(points / points.sum(dim=1, keepdim=True))


def interior(points: Float64[Tensor, "P T"], epsilon: float) -> Float64[Tensor, "Q T"]:
    """Move preferences off the boundary: ``(1 - T ε) p + ε``, duplicates removed.

    Args:
        points: Preferences ``(P, T)``.
        epsilon: Smallest weight ε of any task afterwards, in [0, 1/T]; 0 changes nothing.

    Example:
        >>> interior(one_hot(2), 0.25)
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]], dtype=torch.float64)
    """
    num_tasks = points.shape[1]
    if not 0 <= epsilon <= 1 / num_tasks:
        raise ValueError(
            f"epsilon must be between 0 and 1/T = {1 / num_tasks:.4g} for {num_tasks} tasks, "
            f"found {epsilon}."
        )
    return without_duplicates(
        points if epsilon == 0 else (1 - num_tasks * epsilon) * points + epsilon
    )


def without_duplicates(points: Float64[Tensor, "P T"]) -> Float64[Tensor, "Q T"]:
    """The different rows, in the order in which they first appear."""
    first = {tuple(row): index for index, row in reversed(list(enumerate(points.tolist())))}
    return points[sorted(first.values())]


def _favour(num_tasks: int, task: int, weight: float) -> Tensor:
    if num_tasks == 1:
        return torch.ones(1, dtype=torch.float64)
    row = torch.full((num_tasks,), (1.0 - weight) / (num_tasks - 1), dtype=torch.float64)
    row[task] = weight
    return row


def _compositions(num_tasks: int, total: int) -> Tensor:
    """All ``(P, T)`` integers ``>= 0`` summing to ``total``, as float64: stars and bars."""
    size = math.comb(total + num_tasks - 1, num_tasks - 1)
    if size > MAX_LATTICE_POINTS:
        raise ValueError(
            f"a lattice of {total} divisions over {num_tasks} tasks has {size:,} points; the limit "
            f"is {MAX_LATTICE_POINTS:,}. Take fewer divisions, or draw points with dirichlet()."
        )
    places = range(total + num_tasks - 1)
    bars = torch.tensor(list(itertools.combinations(places, num_tasks - 1)), dtype=torch.float64)
    edge = torch.full((size, 1), 1.0, dtype=torch.float64)
    walls = torch.cat([-edge, bars.reshape(size, -1), edge * len(places)], dim=1)
    return walls.diff(dim=1) - 1


def _check_tasks(num_tasks: int, at_least: int = 1) -> None:
    _check_count("num_tasks", num_tasks, at_least)


def _check_count(name: str, value: int, at_least: int) -> None:
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, found {value}.")


def _check_index(name: str, value: int, num_tasks: int) -> int:
    if not 0 <= value < num_tasks:
        raise ValueError(
            f"{name} is {value}, expected the index of one of {num_tasks} tasks: "
            f"0 to {num_tasks - 1}."
        )
    return value


def _check_unit(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, found {value}.")
