"""The front of two tasks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_merge.correction.fit import TaskFit
from lightning_merge.correction.linear_map import LinearMap
from lightning_merge.functional.two_task_front import TwoTaskFront, two_task_front


@dataclass(frozen=True)
class EdgeFront:
    """Every mixture of two tasks, from one factorisation."""

    fits: tuple[TaskFit, TaskFit]
    scales: tuple[float, float]
    """Scales s of the two losses."""
    parts: TwoTaskFront

    @classmethod
    def of(cls, fits: tuple[TaskFit, TaskFit], scales: tuple[float, float]) -> "EdgeFront":
        """Factorise two tasks together; the first needs a positive ridge or enough samples."""
        a, b = fits
        if max(a.ridge, b.ridge) == float("inf"):
            raise ValueError("a two-task front needs a finite beta.")
        return cls(fits, scales, two_task_front(a.curvature, a.target, b.curvature, b.target))

    def maps(self, preference_b: Tensor, task: int = 0) -> LinearMap:
        """Maps for preferences ``(1 - x, x)``.

        Args:
            preference_b: x of P points, (P,), from 0 to 1.
            task: Whose bias (0 or 1), with one bias a task.

        Returns:
            A batch of P maps.
        """
        x = preference_b.to(self.parts.basis)
        if bool(((x < 0) | (x > 1) | x.isnan()).any()):
            raise ValueError(f"preferences of the second task are {x.tolist()}; expected 0 to 1.")
        largest = max(self.scales)
        maps = self.parts.maps((1 - x) * self.scales[0] / largest, x * self.scales[1] / largest)
        fit = self.fits[task]
        if fit.bias == "shared":
            return LinearMap(maps[..., :-1], maps[..., -1])
        return LinearMap(maps, fit.offset(maps) if fit.bias == "per_task" else None)

    def features(self, merged: Tensor) -> Tensor:
        """Merged features (n, d) turned once, so that each point of the front costs O(k d)."""
        if self.fits[0].bias == "shared":
            merged = torch.cat([merged, torch.ones_like(merged[:, :1])], 1)
        return merged.to(self.parts.basis) @ self.parts.basis
