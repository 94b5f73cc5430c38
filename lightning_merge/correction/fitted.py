"""The tasks of a correction, each fitted when it is first asked for."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_merge.correction.checks import Head
from lightning_merge.correction.choice import BetaMode, Choice
from lightning_merge.correction.fit import MIXING_CAP, Bias, TaskFit
from lightning_merge.correction.head_maps import HeadMetric, read_rows
from lightning_merge.correction.mixing import best_cap
from lightning_merge.correction.mixture import mixed_maps
from lightning_merge.correction.moments import Moments
from lightning_merge.correction.search import (
    BetaSearch,
    Found,
    SearchProblem,
    candidates,
    fallback,
    search,
)
from lightning_merge.correction.statistics import CorrectionStatistics

TaskScale = Literal["none", "per_sample", "per_energy", "per_gap"]
Prior = Literal["auto", "procrustes", "scaled", "identity", "svd"]


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """The options of a correction that a single task needs; see ``ClosedFormCorrection``."""

    beta: float | Literal["auto"] | Mapping[str, float]
    beta_mode: BetaMode
    prior: Prior | Tensor
    anchor: float
    task_scale: TaskScale
    bias: Bias
    proper: bool
    refine: bool
    search: BetaSearch
    head: HeadMetric


@dataclass
class FittedTasks:
    """Fits, searches and scales by task, each computed once."""

    statistics: Mapping[str, CorrectionStatistics]
    options: FitOptions
    heads: Mapping[str, Head] | None
    choices: dict[str, Choice]
    found: dict[str, Found] = field(default_factory=dict)
    mixing_cap: float | None = None
    """Bound of searched ridges in mixtures; None until it is found."""
    _fits: dict[str, TaskFit] = field(default_factory=dict)
    _mixed: dict[str, TaskFit] = field(default_factory=dict)
    _rows: dict[str, Tensor] = field(default_factory=dict)
    _scales: dict[str, float] = field(default_factory=dict)

    def fit(self, task: str) -> TaskFit:
        """The linear system of a task.

        Raises:
            ValueError: If the task has no samples or no energy.
        """
        if task not in self._fits:
            total = _checked_total(task, self.statistics[task])
            options = self.options
            spread = float(total.gram.trace()) if options.bias == "none" else _spread(total)
            if not spread > 1e-14 * float(total.gram.trace()):
                raise ValueError(
                    f"task '{task}': its {total.count} calibration samples have equal features, "
                    f"which bias='{options.bias}' takes for the mean. Calibrate on more samples, "
                    "or use bias='none'."
                )
            if options.bias != "none" and total.cancels:
                warnings.warn(
                    f"task '{task}': the mean holds nearly all energy of the merged features, so "
                    "moments about it have lost their digits. Subtract a fixed vector near the "
                    "mean from the features of both backbones before calibration.",
                    stacklevel=2,
                )
            self._fits[task] = TaskFit(
                task=task,
                choice=self.choice(task),
                total=total,
                bias=options.bias,
                beta_mode=options.beta_mode,
                given=self._given,
                proper=options.proper,
                refine=options.refine,
                capped=self.heads is not None,
            )
        return self._fits[task]

    def mixed(self, task: str) -> TaskFit:
        """The linear system of a task as mixtures see it."""
        fit = self.fit(task)
        if not fit.choice.searched:
            return fit
        if task not in self._mixed or self._mixed[task].mixing_cap != self.cap():
            self._mixed[task] = fit.with_cap(self.cap())
        return self._mixed[task]

    def cap(self) -> float:
        """The bound of searched ridges, one for all tasks, found on the folds."""
        if self.mixing_cap is None:
            fits = [fit for task in self.statistics if (fit := self._sound(task)) is not None]
            widths = {fit.total.cross.shape for fit in fits}
            folds = {
                fit.task: [
                    self.statistics[fit.task].fold(f)
                    for f in range(self.statistics[fit.task].num_folds)
                ]
                for fit in fits
            }
            alike = len(widths) == 1 and len({len(parts) for parts in folds.values()}) == 1
            rows = {fit.task: self.rows(fit.task) for fit in fits}
            self.mixing_cap = best_cap(fits, folds, rows) if alike else MIXING_CAP
        return self.mixing_cap

    def _sound(self, task: str) -> TaskFit | None:
        """The fit of a task with enough samples to search; a broken one must not stop others."""
        try:
            fit = self.fit(task) if self.statistics[task].count else None
        except ValueError:
            return None
        return fit if fit is not None and fit.choice.searched else None

    def rows(self, task: str) -> Tensor | None:
        """What the task's head reads, (r, k), in the head metric."""
        if self.heads is None:
            return None
        if task not in self._rows:
            like = self.statistics[task].total().cross
            self._rows[task] = read_rows(self.heads[task][0], like, self.options.head)
        return self._rows[task]

    def choice(self, task: str) -> Choice:
        """Prior and ridge of a task: given, stored, or found now."""
        if task not in self.choices:
            self.choices[task] = self._chosen(task)
        return self.choices[task]

    @property
    def searches(self) -> bool:
        """Whether something is left to be found."""
        return "auto" in (self.options.beta, self.options.prior)

    def _chosen(self, task: str) -> Choice:
        beta, prior = self.options.beta, self.options.prior
        ridge = beta[task] if isinstance(beta, Mapping) else beta
        if not self.searches:
            name: Any = "given" if isinstance(prior, Tensor) else prior
            return Choice(prior=name, anchor=self.options.anchor, beta=float(ridge))
        problem = self.problem(task)
        found = search(problem, self.options.search)
        if found is None:
            return fallback(problem)
        self.found[task] = found
        self._warn(task, found, problem.total.energy)
        return found.choice

    def _warn(self, task: str, found: Found, energy: float) -> None:
        held_out = self.options.search.criterion == "kfold"
        if held_out and found.baseline is not None and found.score > found.baseline + 1e-9 * energy:
            warnings.warn(
                f"task '{task}': on held-out samples the correction is worse than none (squared "
                f"error {found.score:.3g} against {found.baseline:.3g}). Calibrate on more samples"
                + (", or use bias='none'." if self.options.bias != "none" else ".")
                + " With beta='auto', prior='auto' and no bias it would be no worse.",
                stacklevel=3,
            )
        if found.at_edge and found.score > 1e-12 * energy:
            warnings.warn(
                f"task '{task}': the best ridge is the weakest that was tried "
                f"({found.betas[0]:.0e} of the mean feature energy). Give beta yourself if a "
                "weaker one is meant.",
                stacklevel=3,
            )

    def problem(self, task: str) -> SearchProblem:
        """The search for the prior and ridge of a task."""
        statistics, options = self.statistics[task], self.options
        beta = options.beta[task] if isinstance(options.beta, Mapping) else options.beta
        prior = "given" if isinstance(options.prior, Tensor) else options.prior
        square = statistics.dim_merged == statistics.dim_expert
        tried = candidates(prior, options.anchor, square=square, anchors=options.search.anchors)
        return SearchProblem(
            task=task,
            total=_checked_total(task, statistics),
            folds=statistics.folds(),
            bias=options.bias,
            beta_mode=options.beta_mode,
            candidates=tried,
            given=self._given,
            proper=options.proper,
            refine=options.refine,
            rows=self.rows(task),
            beta=None if beta == "auto" else float(beta),
        )

    @property
    def _given(self) -> Tensor | None:
        return self.options.prior if isinstance(self.options.prior, Tensor) else None

    def energy(self, task: str) -> float:
        """Energy of what counts: of the features, or of what the head reads; centred if affine."""
        return self.fit(task).fitted.read_by(self.rows(task)).energy

    def metric(self, task: str) -> Tensor | None:
        r"""Metric :math:`S = H^\top H + \rho I` of a task, (k, k); None is the identity."""
        rows = self.rows(task)
        if rows is None:
            return None
        floor = self.options.head.representation_weight
        return rows.T @ rows + floor * torch.eye(rows.shape[1]).to(rows)

    def scale(self, task: str) -> float:
        """Scale s of a task's loss."""
        if task not in self._scales:
            self._scales[task] = 1 / self._denominator(task)
        return self._scales[task]

    def _denominator(self, task: str) -> float:
        kind = self.options.task_scale
        if kind == "none":
            return 1.0
        if kind == "per_sample":
            return self.fit(task).total.n
        if kind == "per_gap":
            return self._gap(task)
        energy = self.energy(task)
        if energy > 0:
            return energy
        raise ValueError(
            f"task '{task}': its expert features have no energy, so task_scale='per_energy' is not "
            "defined. Check the expert, or use task_scale='per_sample'."
        )

    def _gap(self, task: str) -> float:
        """What the task's own map recovers over doing nothing (k = d) or the equal mixture."""
        fit = self.fit(task)
        if math.isinf(fit.ridge):
            raise ValueError(f"task '{task}': task_scale='per_gap' needs a finite beta.")
        k, d = fit.total.cross.shape
        if k == d:
            reference = torch.eye(k, fit.curvature.shape[1]).to(fit.curvature)
        else:
            others = [self.fit(name) for name in self._alike(task)]
            equal = torch.tensor([[1 / f.fitted.energy for f in others]], dtype=torch.float64)
            reference = mixed_maps(others, equal)[0]
        gap = float(fit.excess(reference, self.metric(task)))
        if gap > 1e-12 * self.energy(task):
            return gap
        raise ValueError(
            f"task '{task}': the correction has nothing to recover, so task_scale='per_gap' is not "
            "defined. Use task_scale='per_energy'."
        )

    def _alike(self, task: str) -> list[str]:
        width = self.statistics[task].dim_expert
        return [t for t, s in self.statistics.items() if s.count and s.dim_expert == width]

    def with_statistics(
        self, statistics: Mapping[str, CorrectionStatistics], heads: Mapping[str, Head] | None
    ) -> "FittedTasks":
        """The same for other tasks; what is known of unchanged ones is kept."""
        same = [
            task
            for task, value in statistics.items()
            if self.statistics.get(task) is value
            and (heads is None or (self.heads or {}).get(task) is heads[task])
        ]
        scales = {} if self.options.task_scale == "per_gap" else self._scales
        return FittedTasks(
            statistics,
            self.options,
            heads,
            choices=_only(self.choices, same),
            found=_only(self.found, same),
            _fits=_only(self._fits, same),
            _rows=_only(self._rows, same),
            _scales=_only(scales, same),
        )


def _only(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _spread(total: Moments) -> float:
    """Energy of the merged features about their mean."""
    return float(total.gram.trace()) - float(total.sum_merged @ total.sum_merged) / total.n


def _checked_total(task: str, statistics: CorrectionStatistics) -> Moments:
    if statistics.count == 0 or statistics.effective_count == 0:
        raise ValueError(
            f"task '{task}' has a positive preference but no calibration samples. Calibrate it, or "
            "give it preference 0."
        )
    total = statistics.total()
    if not bool(total.cross.any()):
        raise ValueError(
            f"task '{task}': the expert and the merged features have no common energy, so there is "
            "nothing to align. Check that both networks return features, not zeros."
        )
    return total
