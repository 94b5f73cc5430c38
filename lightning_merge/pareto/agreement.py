"""How well results follow the preferences that asked for them: uniformity and alignment."""

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_merge.pareto.fronts import check_values


def uniformity(
    preferences: Float[Tensor, "P T"], losses: Float[Tensor, "P T"]
) -> Float[Tensor, " P"]:
    r"""How equal the weighted losses are, for each preference (Mahapatra & Rajan, ICML 2020).

    .. math::
        \hat l_t = \frac{p_t l_t}{\sum_s p_s l_s},\qquad U = 1 - \sum_t \hat l_t \ln(T\,\hat l_t)

    ``U`` is 1 where ``p_t l_t`` is the same for all tasks, and at least ``1 - ln T``. A one-hot
    preference has ``U = 1 - ln T`` whatever the losses, so average over :func:`is_interior` rows.
    ``0 ln 0 = 0``; where all weighted losses are zero, ``U`` is 1. Computed in float64.

    Args:
        preferences: Non-negative weights, one row for each preference.
        losses: Non-negative losses at that preference, for instance one minus the accuracy.

    Example:
        >>> uniformity(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.1, 0.1]]))
        tensor([1.], dtype=torch.float64)
    """
    check_pair(preferences, losses, "losses")
    if bool((losses < 0).any()):
        raise ValueError(f"losses must not be negative, found {float(losses.min()):.4g}.")
    weighted = preferences.double() * losses.double()
    total = weighted.sum(dim=1, keepdim=True)
    shares = torch.where(total > 0, weighted / total, 1.0 / weighted.shape[1])
    return 1 - torch.special.xlogy(shares, shares * weighted.shape[1]).sum(dim=1)


def is_interior(preferences: Float[Tensor, "P T"]) -> Tensor:
    """True for the preferences that give every task some weight."""
    return (preferences > 0).all(dim=1)


def kendall_tau(
    preferences: Float[Tensor, "P T"], values: Float[Tensor, "P T"]
) -> Float[Tensor, " T"]:
    """Kendall's τ-b between each task's weight and its value over the points.

    1 where more weight always gives a larger value. NaN for a task whose weight or value is
    constant over the points.
    """
    from scipy.stats import kendalltau

    check_pair(preferences, values, "values")
    taus = [float("nan")] * preferences.shape[1]
    for task, (weight, value) in enumerate(zip(preferences.T, values.T, strict=True)):
        if bool((weight != weight[0]).any()) and bool((value != value[0]).any()):
            taus[task] = float(kendalltau(weight.numpy(), value.numpy()).statistic)
    return torch.tensor(taus, dtype=torch.float64)


def monotonicity_violations(
    preferences: Float[Tensor, "P T"],
    values: Float[Tensor, "P T"],
    *,
    tolerance: float = 1e-3,
) -> Float[Tensor, ""]:
    """Share of the steps along pairwise edges on which the task that gains weight loses value.

    An edge is made of the points whose weight is on two tasks alone, or floored: all other tasks
    at the same smaller weight; its neighbours, sorted by weight, are the steps, each walked both
    ways. NaN where the points hold no edge.

    Args:
        preferences: One row for each point.
        values: The values at the points.
        tolerance: A loss up to this counts as none; the default is 0.1 points of an accuracy.
    """
    check_pair(preferences, values, "values")
    steps = broken = 0
    for first, second in itertools.combinations(range(preferences.shape[1]), 2):
        for edge in _edges(preferences, first, second):
            for rising in (first, second):
                order = edge[torch.argsort(preferences[edge, rising], stable=True)]
                change = values[order, rising].diff()
                steps += change.numel()
                broken += int((change < -tolerance).sum())
    return torch.tensor(broken / steps if steps else float("nan"), dtype=torch.float64)


def edge_rows(preferences: Float[Tensor, "P T"], first: int, second: int) -> Tensor:
    """Indices of the points on the unfloored edge of two tasks, by rising weight of ``second``."""
    elsewhere = preferences.sum(dim=1) - preferences[:, [first, second]].sum(dim=1)
    rows = torch.nonzero(elsewhere < 1e-9).flatten()
    return rows[torch.argsort(preferences[rows, second], stable=True)]


def _edges(preferences: Tensor, first: int, second: int) -> list[Tensor]:
    """Groups of at least two points that differ in the weights of two tasks alone."""
    others = [task for task in range(preferences.shape[1]) if task not in (first, second)]
    if not others:
        return [torch.arange(len(preferences))] if len(preferences) > 1 else []
    rest = preferences[:, others]
    smaller = preferences[:, [first, second]].amin(dim=1)
    floored = (rest.amax(dim=1) - rest.amin(dim=1) < 1e-9) & (rest[:, 0] <= smaller + 1e-9)
    groups: dict[int, list[int]] = {}
    for row in torch.nonzero(floored).flatten().tolist():
        groups.setdefault(round(float(rest[row, 0]) * 1e9), []).append(row)
    return [torch.tensor(rows) for rows in groups.values() if len(rows) > 1]


def control_range(
    preferences: Float[Tensor, "P T"], values: Float[Tensor, "P T"]
) -> Float[Tensor, " T"]:
    """How far the preference moves each task: its value at its own corner minus its lowest value.

    NaN for a task whose one-hot preference is not among the points.
    """
    check_pair(preferences, values, "values")
    corners = [_corner(preferences, task) for task in range(preferences.shape[1])]
    ranges = [
        float("nan") if row is None else float(values[row, task] - values[:, task].min())
        for task, row in enumerate(corners)
    ]
    return torch.tensor(ranges, dtype=torch.float64)


def cross_cost(
    preferences: Float[Tensor, "P T"], values: Float[Tensor, "P T"]
) -> Float[Tensor, " T"]:
    """What favouring one task costs the others: their mean fall from equal to its one-hot point.

    NaN where the equal or the one-hot preference is not among the points, or there is one task.
    """
    check_pair(preferences, values, "values")
    num_tasks = preferences.shape[1]
    middle = _row_near(preferences, torch.full((num_tasks,), 1.0 / num_tasks))
    costs = []
    for task in range(num_tasks):
        corner = _corner(preferences, task)
        if middle is None or corner is None or num_tasks == 1:
            costs.append(float("nan"))
            continue
        fall = values[middle].double() - values[corner].double()
        costs.append(float(fall.sum() - fall[task]) / (num_tasks - 1))
    return torch.tensor(costs, dtype=torch.float64)


def _corner(preferences: Tensor, task: int) -> int | None:
    target = torch.zeros(preferences.shape[1])
    target[task] = 1.0
    return _row_near(preferences, target)


def _row_near(preferences: Tensor, target: Tensor) -> int | None:
    # float32 preferences carry 1e-8 of rounding; no sensible grid is finer than 1e-6
    near = (preferences.double() - target.double()).abs().amax(dim=1) < 1e-6
    return int(near.nonzero()[0]) if bool(near.any()) else None


def check_pair(preferences: Tensor, values: Tensor, name: str) -> None:
    """Raise a ``ValueError`` unless both are finite ``(P, T)``, with no negative weight."""
    check_values("preferences", preferences)
    check_values(name, values)
    if preferences.shape != values.shape:
        raise ValueError(
            f"preferences and {name} must have one shape (points, tasks), found "
            f"{tuple(preferences.shape)} and {tuple(values.shape)}."
        )
    if bool((preferences < 0).any()):
        raise ValueError(f"preferences must not be negative, found {float(preferences.min()):.4g}.")
