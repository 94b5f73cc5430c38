"""Maps for mixtures of tasks, in the metric of the tasks' heads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lightning_merge.correction.checks import Head
from lightning_merge.correction.fit import TaskFit
from lightning_merge.correction.mixture import HeadRows, shared_maps
from lightning_merge.functional.head_metric import (
    Decoupling,
    HeadSystem,
    conjugate_gradients,
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


PATTERNS = 8
"""Sets of active tasks whose decoupling is kept."""


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
    _decoupled: dict[tuple[int, ...], Decoupling] = field(default_factory=dict, repr=False)

    def maps(self, weights: Tensor, heads: HeadRows | None = None) -> Tensor:
        """The maps (P, k, D) for weights (P, T), or ``heads.weight @ maps``."""
        # Tasks without weight have no effect: each set of active tasks is its own problem.
        patterns, group = torch.unique(weights > 0, dim=0, return_inverse=True)
        parts, places = [], []
        for number, pattern in enumerate(patterns):
            chosen = (group == number).nonzero().flatten()
            active = tuple(pattern.nonzero().flatten().tolist())
            parts.append(self._active_maps(active, weights[chosen], heads))
            places.append(chosen)
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)[torch.cat(places).argsort().to(parts[0].device)]

    def _active_maps(
        self, active: tuple[int, ...], weights: Tensor, heads: HeadRows | None
    ) -> Tensor:
        fits = [self.fits[i] for i in active]
        if len(fits) == 1:
            own = fits[0].own if heads is None else heads.weight @ fits[0].own
            return own.expand(len(weights), -1, -1)
        w = weights[:, list(active)]
        decoupled = self._decoupling(active)
        if decoupled is None:
            maps = self._competing(active, weights)
            return maps if heads is None else heads.weight @ maps
        if heads is None:
            return decoupled.maps(shared_maps(fits, w))
        if heads.decoupled is None or heads.decoupled[0] is not decoupled:
            heads.decoupled = decoupled, *_fewest_rows(heads, decoupled)
        _, left, index, constant = heads.decoupled
        left.points += len(weights)
        return shared_maps(fits, w, left)[:, index] + constant

    def _decoupling(self, active: tuple[int, ...]) -> Decoupling | None:
        """How these tasks are served at once; None if their heads compete."""
        if not (self.all_independent or independent([self._bases[i] for i in active])):
            return None
        if active not in self._decoupled:
            while len(self._decoupled) >= PATTERNS:
                del self._decoupled[next(iter(self._decoupled))]
            self._decoupled[active] = Decoupling.of(
                [self._bases[i] for i in active], [self.fits[i].own for i in active]
            )
        return self._decoupled[active]

    @cached_property
    def _bases(self) -> list[Tensor]:
        return [row_space(H)[0] for H in self.rows]

    @cached_property
    def all_independent(self) -> bool:
        """Whether no heads compete; then those of fewer tasks don't either."""
        return independent(self._bases)

    def _competing(self, active: tuple[int, ...], weights: Tensor) -> Tensor:
        fits = [self.fits[i] for i in active]
        shared = shared_maps(fits, weights[:, list(active)])
        w = weights[:, list(active)].to(shared)
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


def decouple(heads: Mapping[str, Head], options: HeadMetric) -> bool:
    """Whether heads read independent directions, so that the head metric has a closed form.

    Heads of different widths never share a map. A head that reads nothing has no metric.
    """
    bases: dict[int, list[Tensor]] = {}
    for weight, _ in heads.values():
        try:
            rows = readout(weight.detach().double(), centre=options.centre)
        except ValueError:
            return False
        bases.setdefault(rows.shape[1], []).append(row_space(rows)[0])
    return all(independent(group) for group in bases.values())


def read_rows(weight: Tensor, like: Tensor, options: HeadMetric) -> Tensor:
    """What a task's head reads, (r, k), as the statistics' dtype and device."""
    return readout(weight.detach().to(like), centre=options.centre)


EQUAL = 1e-10
"""Rows count as equal up to this part of the head."""


def _fewest_rows(heads: HeadRows, decoupled: Decoupling) -> tuple[HeadRows, Tensor, Tensor]:
    """Rows of the shared map that folded heads depend on, whose each row is, and the rest.

    A head of an active task depends on it by one row alone, which all classes share.
    """
    left, constant = decoupled.split(heads.weight)
    kept, index, start = [], [], 0
    for rows, H in zip(left.split(heads.sizes), heads.weight.split(heads.sizes), strict=True):
        mean = rows.mean(0, keepdim=True)
        same = bool((rows - mean).norm() <= EQUAL * H.norm())
        kept.append(mean if same else rows)
        places = torch.zeros(len(rows)) if same else torch.arange(len(rows))
        index.append(start + places.long())
        start += len(kept[-1])
    stacked = torch.cat(kept)
    return HeadRows(stacked, [len(stacked)]), torch.cat(index).to(stacked.device), constant
