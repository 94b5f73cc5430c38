"""Pareto measures as ``torchmetrics.Metric``: fed in batches, reduced over processes."""

from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_merge.pareto import agreement
from lightning_merge.pareto.fronts import check_values, hypervolume


@final
class Hypervolume(Metric):
    """Volume dominated by the points seen so far, see :func:`.fronts.hypervolume`.

    ``compute()`` returns ``{"hypervolume": ..., "hypervolume_error": ...}``; the error is the
    standard error of the estimate from 6 tasks on, and 0 where the volume is exact.

    Args:
        reference: The worst point that counts, for all tasks or one number for each.
        maximize: Whether larger values are better.
        seed: Seed of the estimate.
        kwargs: Options of ``torchmetrics.Metric``.

    Example:
        >>> measure = Hypervolume()
        >>> measure.update(torch.tensor([[0.5, 1.0], [1.0, 0.5]]))
        >>> float(measure.compute()["hypervolume"])
        0.75
    """

    higher_is_better = True
    full_state_update = False
    values: list[Tensor]

    def __init__(
        self,
        reference: float | Sequence[float] = 0.0,
        *,
        maximize: bool = True,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.reference, self.maximize, self.seed = reference, maximize, seed
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, values: Float[Tensor, "P T"]) -> None:
        """Add the values ``(P, T)`` of some points."""
        check_values("values", values)
        self.values.append(values.detach().double())

    def compute(self) -> dict[str, Tensor]:
        """The volume and its standard error."""
        points = _gathered(self.values)
        found = hypervolume(
            points.cpu(),
            self.reference,
            maximize=self.maximize,
            seed=self.seed,
        )
        return {
            "hypervolume": points.new_tensor(found.value),
            "hypervolume_error": points.new_tensor(found.error),
        }


@final
class Uniformity(Metric):
    """Mean uniformity over the interior preferences, see :func:`.agreement.uniformity`.

    Preferences that give a task no weight do not count: their uniformity says nothing about the
    model. ``num_boundary`` counts them. NaN where no preference counts.

    Args:
        best: What a perfect model reaches, so that the loss is ``best - value`` (not below 0), as
            for accuracies. ``None``: the values are losses themselves.
        kwargs: Options of ``torchmetrics.Metric``.

    Example:
        >>> measure = Uniformity()
        >>> measure.update(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.9]]))
        >>> float(measure.compute())
        1.0
    """

    higher_is_better = True
    full_state_update = False
    total: Tensor
    num_interior: Tensor
    num_boundary: Tensor

    def __init__(self, best: float | None = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.best = best
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("total", default=zero, dist_reduce_fx="sum")
        self.add_state("num_interior", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("num_boundary", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preferences: Float[Tensor, "P T"], values: Float[Tensor, "P T"]) -> None:
        """Add some preferences and the values ``(P, T)`` reached at them."""
        losses = values if self.best is None else (self.best - values.double()).clamp(min=0)
        each = agreement.uniformity(preferences, losses)
        inside = agreement.is_interior(preferences)
        self.total += each[inside].sum()
        self.num_interior += inside.sum()
        self.num_boundary += (~inside).sum()

    def compute(self) -> Tensor:
        """The mean, in ``[1 - ln T, 1]``."""
        return self.total / self.num_interior


@final
class PreferenceAlignment(Metric):
    """Whether the values follow the preferences.

    ``compute()`` returns

    - ``kendall_tau`` ``(T,)``: rank correlation of each task's weight and value;
    - ``monotonicity_violations``: share of the steps along pairwise edges on which the task that
      gains weight loses more than the tolerance;
    - ``control_range`` ``(T,)``: value at the task's own corner minus its lowest;
    - ``cross_cost`` ``(T,)``: mean fall of the other tasks from equal to this task's corner.

    What the points seen do not show is NaN, see the functions of :mod:`.agreement`.

    Args:
        maximize: Whether larger values are better; otherwise the values are negated first.
        tolerance: Loss of value that still counts as none.
        kwargs: Options of ``torchmetrics.Metric``.
    """

    full_state_update = False
    preferences: list[Tensor]
    values: list[Tensor]

    def __init__(self, *, maximize: bool = True, tolerance: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.maximize, self.tolerance = maximize, tolerance
        self.add_state("preferences", default=[], dist_reduce_fx="cat")
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, preferences: Float[Tensor, "P T"], values: Float[Tensor, "P T"]) -> None:
        """Add some preferences and the values ``(P, T)`` reached at them."""
        agreement.check_pair(preferences, values, "values")
        self.preferences.append(preferences.detach().double())
        self.values.append(values.detach().double() * (1 if self.maximize else -1))

    def compute(self) -> dict[str, Tensor]:
        """The four measures."""
        values = _gathered(self.values)
        points, preferences = values.cpu(), _gathered(self.preferences).cpu()
        found = {
            "kendall_tau": agreement.kendall_tau(preferences, points),
            "monotonicity_violations": agreement.monotonicity_violations(
                preferences, points, tolerance=self.tolerance
            ),
            "control_range": agreement.control_range(preferences, points),
            "cross_cost": agreement.cross_cost(preferences, points),
        }
        return {name: value.to(values.device) for name, value in found.items()}


def _gathered(state: list[Tensor] | Tensor) -> Tensor:
    if len(state) == 0:
        raise ValueError("no values were seen: call update() before compute().")
    return dim_zero_cat(state)
