"""The least squares of one layer: task vectors, and the objective of each task and fold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_merge.functional.projection import Quadratic, damped, same_input, weighted_sum
from lightning_merge.layers.coordinates import Coordinates
from lightning_merge.layers.sites import Site
from lightning_merge.layers.statistics import LayerSums

TaskScale: TypeAlias = Literal["none", "per_sample", "per_energy"]
FLOOR = 1e-6
"""Residuals count as at least this share of the targets' energy where they divide."""


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """What the merge of one layer is solved from."""

    site: Site
    deltas: Tensor
    """Task vectors, (T, g, o, i)."""
    parts: Sequence[Sequence[Quadratic]]
    """Objectives by task and fold."""
    target_energies: Sequence[float]
    """Energy of the targets by task."""
    counts: Sequence[float]
    """Columns by task."""
    coordinates: Coordinates | None = None
    """What the problem of a wide layer is written in; then (g, o, i) is (g·o, 1, E)."""

    @property
    def energies(self) -> list[float]:
        """Residual energies by task, over all folds."""
        return [math.fsum(fold.energy for fold in folds) for folds in self.parts]

    def weights(self, preference: Sequence[float], scale: TaskScale) -> list[float]:
        r""":math:`w_t = p_t s_t`; see :data:`TaskScale`.

        ``per_energy`` divides by the residual energy: relative errors count equally.
        """
        weights = []
        for p, residual, energy, count in zip(
            preference, self.energies, self.target_energies, self.counts, strict=True
        ):
            if scale == "none":
                divisor = 1.0
            elif scale == "per_sample":
                divisor = count
            else:
                divisor = max(residual, FLOOR * energy)
            weights.append(p / divisor if divisor > 0 else 0.0)
        return weights

    def observations(self, weights: Sequence[float]) -> float:
        """Columns times outputs of the tasks that count; what drawn columns stand for included."""
        columns = sum(n for n, w in zip(self.counts, weights, strict=True) if w > 0)
        _, g, o, _ = self.deltas.shape
        # A token number meets one of the g rows of an embedding; any other column meets all.
        return columns * (o if self.site.kind == "embedding" else g * o)

    def weighted(self, weights: Sequence[float]) -> tuple[Quadratic, list[Quadratic]]:
        """The objective of all tasks together: over all samples, and by fold."""
        folds = [weighted_sum(fold, weights) for fold in zip(*self.parts, strict=True)]
        return weighted_sum(folds, [1.0] * len(folds)), folds


def layer_problem(
    site: Site,
    base: Tensor,
    experts: Sequence[Tensor],
    sums: Sequence[LayerSums],
    *,
    residual_gram: bool = False,
    off_diagonal: float = 1.0,
    coordinates: Coordinates | None = None,
) -> LayerProblem:
    """The problem of a layer, from its matrices (g, o, i) and the sums of every task.

    Sums without targets give ``same_input`` targets: the expert's outputs on the same inputs.

    Args:
        site: The layer.
        base: Its matrix in the base.
        experts: Its matrices in the experts.
        sums: Sums of every task, in the experts' order.
        residual_gram: Keep the second moments of the residuals.
        off_diagonal: RegMean's factor of the off-diagonal second moments.
        coordinates: What matrices and sums are written in, if not in the layer's own inputs.
    """
    deltas = torch.stack(list(experts)) - base
    parts, energies = [], []
    for delta, expert, task in zip(deltas, experts, sums, strict=True):
        if task.has_targets:
            parts.append(task.quadratics())
            energies.append(task.target_energy)
            continue
        grams = task.grams()
        if off_diagonal != 1:
            grams = [damped(gram, off_diagonal) for gram in grams]
        parts.append([same_input(delta, g, with_residual=residual_gram) for g in grams])
        energies.append(same_input(expert, torch.stack(grams).sum(0)).energy)
    return LayerProblem(
        site=site,
        deltas=deltas,
        parts=parts,
        target_energies=energies,
        counts=[task.count for task in sums],
        coordinates=coordinates,
    )
