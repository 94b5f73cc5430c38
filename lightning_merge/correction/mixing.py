"""How strongly the ridges of a search may bind tasks to each other in a mixture."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_merge.correction.fit import MIXING_CAP, TaskFit
from lightning_merge.correction.mixture import mixed_maps
from lightning_merge.correction.moments import Moments

CAPS = (MIXING_CAP, 1e-1, 1e-2, 1e-3)
"""Caps that are tried, in units of tr(G)/d."""


def best_cap(
    fits: Sequence[TaskFit],
    folds: Mapping[str, Sequence[Moments]],
    rows: Mapping[str, Tensor | None],
) -> float:
    """The cap with the least held-out error of the equal mixture, relative to each task's energy.

    A task's own map does not depend on it. A high cap lets every map be shrunk in a mixture as it
    is alone; a low one leaves each task alone to decide where it has data. Which is better depends
    on how much the tasks' maps differ, so it is measured, on the folds, with no second data pass.

    Args:
        fits: The tasks, of equal widths.
        folds: The moments of every fold by task, equally many, perhaps some without samples.
        rows: What each task's head reads, or None for the features themselves.
    """
    if len(fits) < 2 or all(fit.with_cap(min(CAPS)).ridge == fit.ridge for fit in fits):
        return MIXING_CAP
    energies = {fit.task: fit.fitted.read_by(rows[fit.task]).energy for fit in fits}
    if not all(value > 0 for value in energies.values()):
        return MIXING_CAP
    weights = torch.tensor([[1 / energies[fit.task] for fit in fits]], dtype=torch.float64)
    totals = dict.fromkeys(CAPS, 0.0)
    for number in range(len(folds[fits[0].task])):
        held_out = {fit.task: folds[fit.task][number] for fit in fits}
        if not any(fold.n > 0 for fold in held_out.values()):
            continue
        trained = [fit.refitted(fit.total.without(held_out[fit.task])) for fit in fits]
        for cap in CAPS:
            capped = [fit.with_cap(cap) for fit in trained]
            maps = mixed_maps(capped, weights)[0]
            for fit in capped:
                error = held_out_error(fit, maps, held_out[fit.task], rows[fit.task])
                totals[cap] += error / energies[fit.task]
    return min(CAPS, key=lambda cap: (totals[cap], -cap))


def held_out_error(fit: TaskFit, maps: Tensor, fold: Moments, rows: Tensor | None) -> float:
    """Squared error of a map (k, D) on a fold, with the bias of this task.

    Behind a head it lacks the energy of what the head reads, which no map changes.
    """
    if fold.n == 0:
        return 0.0
    weight, bias = fit.split(maps)
    if rows is None:
        return fold.error(weight, bias)
    return fold.read_by(rows).error(rows @ weight, None if bias is None else rows @ bias)
