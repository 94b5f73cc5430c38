"""Maps for mixtures of tasks, in the metric of the tasks' heads."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_merge.correction.fit import TaskFit
from lightning_merge.functional.head_metric import (
    HeadSystem,
    conjugate_gradients,
    decoupled_map,
    independent,
    readout,
    row_space,
)


@dataclass(frozen=True)
class HeadMetric:
    """How ``metric="head"`` measures and solves."""

    centre: bool = True
    """Take out the mean row of each head, which moves all logits alike. False for heads whose
    logits stand alone (regression, sigmoid)."""
    representation_weight: float = 1e-3
    """Weight of the plain representation error beside what competing heads read; positive. Heads
    that read different directions need none and use its limit of zero."""
    tolerance: float = 1e-9
    """Relative residual to which competing heads are solved."""
    max_steps: int = 1000
    """Conjugate gradient steps between restarts."""

    def __post_init__(self) -> None:
        if not self.representation_weight > 0:
            raise ValueError(
                f"representation_weight={self.representation_weight}: expected a positive number."
            )
        if not 0 < self.tolerance < 1 or self.max_steps < 1:
            raise ValueError(
                f"tolerance={self.tolerance}, max_steps={self.max_steps}: expected a tolerance "
                "between 0 and 1, and at least one step."
            )


@dataclass
class HeadSolver:
    """Solves mixtures in the head metric; keeps the last solutions as first guesses.

    Args:
        fits: The tasks.
        rows: What each head reads, (r_t, k) each.
        options: Tolerances.
    """

    fits: Sequence[TaskFit]
    rows: Sequence[Tensor]
    options: HeadMetric
    residual: float = 0.0
    """Largest certified relative residual so far."""
    _last: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def maps(self, weights: Tensor, shared: Tensor) -> Tensor:
        """The maps (P, k, D) for weights (P, T), given those of the representation metric."""
        result = torch.empty_like(shared)
        # Tasks without weight have no effect: each set of active tasks is its own problem.
        patterns, group = torch.unique(weights > 0, dim=0, return_inverse=True)
        for number, pattern in enumerate(patterns):
            chosen = (group == number).nonzero().flatten()
            active = pattern.nonzero().flatten().tolist()
            result[chosen] = self._active_maps(active, weights[chosen], shared[chosen])
        return result

    def _active_maps(self, active: list[int], weights: Tensor, shared: Tensor) -> Tensor:
        fits = [self.fits[i] for i in active]
        if len(fits) == 1:
            return fits[0].own.expand_as(shared)
        bases = [row_space(self.rows[i])[0] for i in active]
        if independent(bases):
            return decoupled_map(shared, bases, [fit.own for fit in fits])
        w = weights[:, active].to(shared)
        w = w / w.amax(1, keepdim=True)
        system = HeadSystem(
            rows=[self.rows[i] for i in active],
            curvatures=torch.stack([fit.curvature for fit in fits]),
            targets=torch.stack([fit.own @ fit.curvature for fit in fits]),
            floor=self.options.representation_weight,
        )
        maps, residual = conjugate_gradients(
            system,
            w,
            self._guess(weights, shared),
            tolerance=self.options.tolerance,
            max_steps=self.options.max_steps,
        )
        self.residual = max(self.residual, residual)
        self._last = (weights, maps)
        return maps

    def _guess(self, weights: Tensor, shared: Tensor) -> Tensor:
        """Solutions of the nearest weights solved before, or the representation metric's."""
        if self._last is None:
            return shared
        seen, maps = self._last
        seen, new = (w / w.sum(1, keepdim=True) for w in (seen, weights))
        distance, nearest = torch.cdist(new, seen, p=1.0).min(1)
        # Beyond this, the plain solution for the right weights is the better guess.
        return torch.where((distance < 0.5)[:, None, None].to(maps.device), maps[nearest], shared)


def read_rows(weight: Tensor, like: Tensor, options: HeadMetric) -> Tensor:
    """What a task's head reads, (r, k), as the statistics' dtype and device."""
    return readout(weight.detach().to(like), centre=options.centre)
