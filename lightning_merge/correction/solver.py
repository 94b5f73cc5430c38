"""From preferences to maps: weights of the losses, then the minimisers of their sums."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_merge.correction.aggregation import averaged_maps, polar_averaged_maps
from lightning_merge.correction.checks import check_widths
from lightning_merge.correction.fit import TaskFit
from lightning_merge.correction.fitted import FittedTasks
from lightning_merge.correction.head_maps import HeadSolver
from lightning_merge.correction.mixture import HeadRows, shared_maps
from lightning_merge.functional.chebyshev import chebyshev_weights

Scalarization = Literal["linear", "chebyshev"]
Aggregation = Literal["data_aware", "average", "polar"]


@dataclass
class MixtureSolver:
    """Maps for preferences over fitted tasks; see ``ClosedFormCorrection``."""

    fitted: FittedTasks
    scalarization: Scalarization
    aggregation: Aggregation
    _solvers: dict[tuple[str, ...], HeadSolver] = field(default_factory=dict, repr=False)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order."""
        return list(self.fitted.statistics)

    def weights(self, preferences: Tensor) -> Tensor:
        """Weights of the losses, (P, T), for checked preferences (P, T).

        :math:`w_t = p_t s_t`, or what solves the Chebyshev problem.
        """
        used = preferences.any(0).tolist()
        scales = [
            self.fitted.scale(task) if flag else 0.0
            for task, flag in zip(self.tasks, used, strict=True)
        ]
        weights = preferences * torch.tensor(scales, dtype=torch.float64)
        if self.scalarization == "linear":
            return weights
        return torch.stack(
            [self._chebyshev(p, row) for p, row in zip(preferences, weights, strict=True)]
        )

    def _chebyshev(self, preference: Tensor, linear: Tensor) -> Tensor:
        active = preference.nonzero().flatten().tolist()
        names = [self.tasks[i] for i in active]
        if len(names) == 1 or (
            self.fitted.heads is not None and self._solver(names).all_independent
        ):
            return linear  # every task has its own optimum: all losses are zero
        fits = self._fits(names)
        if any(fit.ridge == float("inf") for fit in fits):
            raise ValueError("scalarization='chebyshev' needs a finite beta.")
        metrics = [self.fitted.metric(name) for name in names]
        own = torch.stack([fit.own for fit in fits])
        # Losses of every own map; a task that loses nothing anywhere has no range of its own.
        losses = torch.stack([f.excess(own, S) for f, S in zip(fits, metrics, strict=True)])
        floor = torch.tensor([1e-12 * self.fitted.energy(name) for name in names])
        gaps = torch.maximum(losses.amax(1).cpu(), floor.to(torch.float64))

        def excess(weights: Tensor) -> Tensor:
            W = self._weighted_maps(names, weights[None])[0]
            values = [f.excess(W, S) for f, S in zip(fits, metrics, strict=True)]
            return torch.stack(values).cpu()

        found, _ = chebyshev_weights(preference[active], gaps, excess)
        weights = torch.zeros_like(preference)
        weights[active] = found
        return weights

    def maps(self, preferences: Tensor, heads: HeadRows | None = None) -> Tensor:
        """Maps (P, k, D), or ``heads.weight @ maps`` (P, K, D), for checked preferences (P, T)."""
        used = preferences.any(0)
        names = [t for t, flag in zip(self.tasks, used.tolist(), strict=True) if flag]
        check_widths({name: self.fitted.statistics[name] for name in names})
        if self.aggregation != "data_aware":
            own = [self.fitted.fit(name).own for name in names]
            mix = averaged_maps if self.aggregation == "average" else polar_averaged_maps
            maps = mix(own, preferences[:, used])
            return maps if heads is None else heads.weight @ maps
        return self._weighted_maps(names, self.weights(preferences)[:, used], heads)

    def _weighted_maps(
        self, names: list[str], weights: Tensor, heads: HeadRows | None = None
    ) -> Tensor:
        fits = self._fits(names)
        if len(fits) == 1:  # nothing is mixed: its own map, limits of the ridge included
            own = fits[0].own if heads is None else heads.weight @ fits[0].own
            return own.expand(len(weights), -1, -1)
        if self.fitted.heads is None:
            return shared_maps(fits, weights, heads)
        return self._solver(names).maps(weights, heads)

    def _fits(self, names: list[str]) -> list[TaskFit]:
        if len(names) == 1:
            return [self.fitted.fit(names[0])]
        return [self.fitted.mixed(name) for name in names]

    def _solver(self, names: list[str]) -> HeadSolver:
        key = tuple(names)
        if key not in self._solvers:
            rows = [self.fitted.rows(name) for name in names]
            self._solvers[key] = HeadSolver(
                self._fits(names),
                [H for H in rows if H is not None],
                self.fitted.options.head,
            )
        return self._solvers[key]
