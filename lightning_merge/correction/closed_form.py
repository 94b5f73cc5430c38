"""The closed-form correction: statistics and a preference in, one linear map out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_merge.correction.checks import (
    Head,
    check_beta,
    check_heads,
    check_option,
    check_statistics,
    check_widths,
    checked_metric,
)
from lightning_merge.correction.choice import BetaMode, Choice, reusable_choices
from lightning_merge.correction.fit import Bias
from lightning_merge.correction.fitted import FitOptions, FittedTasks, Prior, TaskScale
from lightning_merge.correction.folding import HeadFolder
from lightning_merge.correction.front import EdgeFront
from lightning_merge.correction.head_maps import HeadMetric
from lightning_merge.correction.linear_map import LinearMap
from lightning_merge.correction.mixture import needs_limit
from lightning_merge.correction.report import task_reports
from lightning_merge.correction.search import BetaSearch
from lightning_merge.correction.solver import Aggregation, MixtureSolver, Scalarization
from lightning_merge.correction.statistics import CorrectionStatistics
from lightning_merge.functional.preference import Preference, as_preference, as_preferences

Metric = Literal["representation", "head"]


class ClosedFormCorrection:
    r"""Preference-controlled linear correction of a merged representation.

    For a preference p the map minimises

    .. math:: \sum_t p_t s_t \left(\|W Z_{m,t} - Z_{i,t}\|_F^2 + \beta_t \|W - W_{0,t}\|_F^2\right)

    as in "From Parameter to Representation" (ReACT, arXiv 2511.10943), where the scale is
    :math:`s_t = 1`, the ridge absolute and the prior a plain Procrustes solution
    (:meth:`paper`). With ``metric="head"`` the error is measured behind each task's head. Nothing
    is solved before it is asked for.

    Args:
        statistics: Statistics of each task, all from one merged backbone. The order is the order
            of preferences given as tensors.
        beta: Ridge in the units of ``beta_mode``, one for all tasks or one a task; 0 and infinity
            are limits. ``"auto"`` finds one a task by exact cross-validation from the statistics.
        beta_mode: ``"relative"`` to the mean feature energy tr(G)/d; ``"per_sample"``;
            ``"absolute"`` on raw sums (the paper).
        prior: What the map is shrunk to: ``"procrustes"`` with the identity-anchored completion,
            ``"scaled"`` times its best factor, ``"identity"``, ``"svd"`` (the paper), a matrix
            (k, d), or ``"auto"``, the best of these and several anchors by cross-validation.
        anchor: Pull of the Procrustes prior to the identity, in units of tr(G)/d.
        task_scale: What equal preference means: ``"none"`` (the paper: sums of squares count),
            ``"per_sample"`` (mean squared errors), ``"per_energy"`` (relative errors) or
            ``"per_gap"`` (fractions of what can be recovered).
        bias: ``"none"`` (the paper), ``"shared"``, or ``"per_task"`` (one weight, each task its
            own bias, absorbed by its head).
        metric: ``"representation"`` (the paper) or ``"head"``, which needs ``heads``.
        heads: Weight (K, k) and bias (K,) or None of each task's linear head.
        scalarization: ``"linear"`` (the paper), or ``"chebyshev"``: :math:`p_t` times the loss,
            as a fraction of its range, is equal over the tasks.
        aggregation: ``"data_aware"`` is the minimiser; ``"average"`` and ``"polar"`` are the
            ablations that mix the tasks' own maps blindly.
        search: How ``"auto"`` is found.
        head: How the head metric measures and solves.
        choices: What :meth:`choices` once returned; those tasks are not searched again, unless
            they were searched in another metric.
        proper: Only rotations, no reflections.
        refine: Refine the prior for k < d.
        strict: See :func:`~lightning_merge.functional.preference.as_preference`.
        memory_cap: Working memory of one batch of preferences, in bytes.

    Raises:
        ValueError: If an option is out of range, or the statistics don't go together.
    """

    def __init__(
        self,
        statistics: Mapping[str, CorrectionStatistics],
        *,
        beta: float | int | Literal["auto"] | Mapping[str, float] = "auto",
        beta_mode: BetaMode = "relative",
        prior: Prior | Tensor = "auto",
        anchor: float | int = 0.0,
        task_scale: TaskScale = "per_energy",
        bias: Bias = "none",
        metric: Metric = "representation",
        heads: Mapping[str, Head] | None = None,
        scalarization: Scalarization = "linear",
        aggregation: Aggregation = "data_aware",
        search: BetaSearch = BetaSearch(),  # noqa: B008 (frozen)
        head: HeadMetric = HeadMetric(),  # noqa: B008 (frozen)
        choices: Mapping[str, Mapping[str, Any]] | None = None,
        proper: bool = False,
        refine: bool = True,
        strict: bool | Literal["error"] = False,
        memory_cap: int = 256 * 2**20,
    ) -> None:
        check_option("beta_mode", beta_mode, get_args(BetaMode))
        check_option("task_scale", task_scale, get_args(TaskScale))
        check_option("bias", bias, get_args(Bias))
        check_option("metric", metric, get_args(Metric))
        check_option("scalarization", scalarization, get_args(Scalarization))
        check_option("aggregation", aggregation, get_args(Aggregation))
        check_statistics(statistics)
        check_beta(beta, list(statistics))
        Choice(anchor=float(anchor))
        used = checked_metric(metric, heads, statistics, aggregation, bias)
        self.metric, self.scalarization, self.aggregation = metric, scalarization, aggregation
        self.strict, self.memory_cap = strict, memory_cap
        self.options = FitOptions(
            beta=float(beta) if isinstance(beta, int) else beta,
            beta_mode=beta_mode,
            prior=prior,
            anchor=float(anchor),
            task_scale=task_scale,
            bias=bias,
            proper=proper,
            refine=refine,
            search=search,
            head=head,
        )
        stored = (choices or {}) if "auto" in (beta, prior) else {}  # what is given needs no search
        known, cap = reusable_choices(stored, list(statistics), metric)
        self.fitted = FittedTasks(dict(statistics), self.options, used, known, mixing_cap=cap)
        self._prepare()

    def _prepare(self) -> None:
        """Nothing is solved yet for these tasks."""
        self.solver = MixtureSolver(self.fitted, self.scalarization, self.aggregation)
        self._folder = HeadFolder(self.fitted, self.solver, self.memory_cap)

    @classmethod
    def paper(cls, statistics: Mapping[str, CorrectionStatistics]) -> "ClosedFormCorrection":
        """The published recipe: absolute ridge 0.1 on raw sums, plain Procrustes, no scales."""
        return cls(
            statistics,
            beta=0.1,
            beta_mode="absolute",
            prior="svd",
            task_scale="none",
            bias="none",
        )

    @property
    def statistics(self) -> Mapping[str, CorrectionStatistics]:
        """The statistics of each task."""
        return self.fitted.statistics

    @property
    def bias(self) -> Bias:
        """Which biases the maps have."""
        return self.options.bias

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order of preferences given as tensors."""
        return list(self.statistics)

    def choices(self) -> dict[str, dict[str, Any]]:
        """Prior and ridge of every task with samples, found now if need be, as JSON-able data.

        With each goes the metric it holds for.
        """
        for task, statistics in self.statistics.items():
            if statistics.count:
                self.fitted.choice(task)
        cap = {"mixing_cap": self.fitted.cap()} if self.fitted.searches else {}
        return {task: {**choice, **cap} for task, choice in self.settled().items()}

    def settled(self) -> dict[str, dict[str, Any]]:
        """The part of :meth:`choices` that is known by now and holds beside any other tasks."""
        known = [task for task in self.tasks if task in self.fitted.choices]
        under = {"metric": self.metric}
        return {task: {**self.fitted.choices[task].as_dict(), **under} for task in known}

    def report(self) -> dict[str, dict[str, Any]]:
        """What was chosen and how well it fits, by task, as JSON-able data.

        Samples, prior, anchor, ridge, share of influence at equal preference, rank and conditioning
        of the features, the :math:`R^2` of the task's own and of the equal map, the held-out error
        and gain of a search, and the distortion table: the held-out part of the difference between
        expert and merged features that a bias, a rotation, a scaled rotation and the full linear
        map remove. Tasks without samples are left out.
        """
        return task_reports(self)

    def with_task(
        self, task: str, statistics: CorrectionStatistics, head: Head | None = None
    ) -> "ClosedFormCorrection":
        """The correction with one more task, or new statistics for a known one.

        Args:
            task: Its name.
            statistics: From the same merged backbone.
            head: Its head, in the head metric.
        """
        heads = self.fitted.heads
        if heads is not None:
            if head is None and task not in heads:
                raise ValueError(f"task '{task}': metric='head' needs its head too.")
            heads = {**heads, task: heads[task] if head is None else head}
        return self._with({**self.statistics, task: statistics}, heads)

    def without_task(self, task: str) -> "ClosedFormCorrection":
        """The correction without one of its tasks.

        Raises:
            KeyError: If the task is unknown.
            ValueError: If it is the only one.
        """
        if task not in self.statistics:
            raise KeyError(f"unknown task '{task}'; known: {self.tasks}.")
        heads = self.fitted.heads
        left = {t: s for t, s in self.statistics.items() if t != task}
        return self._with(
            left, None if heads is None else {t: h for t, h in heads.items() if t != task}
        )

    def _with(
        self, statistics: Mapping[str, CorrectionStatistics], heads: Mapping[str, Head] | None
    ) -> "ClosedFormCorrection":
        options = self.options
        if isinstance(options.beta, Mapping):
            # A new task has no ridge of its own: then one must be found by the caller.
            check_beta(options.beta, list(statistics), subset=True)
        check_statistics(statistics)
        if heads is not None:
            check_heads(heads, statistics)
        copy = object.__new__(ClosedFormCorrection)
        copy.__dict__.update(self.__dict__)
        copy.fitted = self.fitted.with_statistics(statistics, heads)
        copy._prepare()
        return copy

    def solve(self, preference: Preference, task: str | None = None) -> LinearMap:
        """The map for one preference.

        Args:
            preference: Weights by task, or a vector over :attr:`tasks`.
            task: Whose bias, for ``bias="per_task"``; a one-hot preference names it itself.

        Returns:
            Weight (k, d) and bias (k,) or None, in float64.

        Raises:
            KeyError: If a task is unknown.
            ValueError: If the preference is not valid, or a task with positive weight has no
                samples.
        """
        p = as_preference(preference, self.tasks, strict=self.strict)
        if task is None and self.bias == "per_task" and int((p > 0).sum()) == 1:
            task = self.tasks[int(p.argmax())]
        return self.solve_many(p[None], task)[0]

    def solve_many(
        self, preferences: Tensor | Sequence[Preference], task: str | None = None
    ) -> LinearMap:
        """The maps for P preferences, batched: weight (P, k, d), bias (P, k) or None.

        Args:
            preferences: (P, T), or a list of preferences.
            task: Whose bias, for ``bias="per_task"``.
        """
        P = as_preferences(preferences, self.tasks, strict=self.strict)
        maps = torch.cat([self.solver.maps(chunk) for chunk in P.split(self._chunk(len(P)))])
        if task is not None and task not in self.statistics:
            raise KeyError(f"unknown task '{task}'; known: {self.tasks}.")
        if self.bias == "none":
            return LinearMap(maps)
        if self.bias == "shared":
            return LinearMap(maps[..., :-1], maps[..., -1])
        if task is None:
            raise ValueError(
                "bias='per_task' has one bias a task: say whose with solve(preference, task=...), "
                "or use fold(preference, task, weight, bias)."
            )
        return LinearMap(maps, self.fitted.fit(task).offset(maps))

    def normal_equations(self) -> dict[str, tuple[Tensor, Tensor]] | None:
        """Both sides of every task's equation, scaled: W_p = (Σ p_t N_t)(Σ p_t C_t)^{-1}.

        Returns:
            N_t (k, d) and C_t (d, d) by task, in float64; None where no such form exists: with a
            bias, the head metric, another scalarization or aggregation, or in a limit of the ridge.
        """
        plain = (self.metric, self.scalarization, self.aggregation, self.bias)
        fits = [self.fitted.fit(task) for task in self.tasks]
        if plain != ("representation", "linear", "data_aware", "none") or needs_limit(fits):
            return None
        scales = [self.fitted.scale(task) for task in self.tasks]
        return {
            fit.task: (scale * fit.target, scale * fit.curvature)
            for fit, scale in zip(fits, scales, strict=True)
        }

    def fold(
        self, preference: Preference, task: str, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A task's linear head with the correction for a preference absorbed.

        Solves for the K rows of the head only, in the representation metric.

        Args:
            preference: One preference, or (P, T) of them.
            task: Whose head it is.
            weight: H, (K, k).
            bias: c, (K,); None is zero.

        Returns:
            Weight (K, d) and bias (K,), or (P, K, d) and (P, K); float64, to be cast once.
        """
        many = isinstance(preference, Tensor) and preference.ndim == 2
        P: Any = preference if many else [preference]
        chunks = [folded[task] for folded in self.fold_heads(P, {task: (weight, bias)})]
        weights, biases = (torch.cat(part) for part in zip(*chunks, strict=True))
        return (weights, biases) if many else (weights[0], biases[0])

    def fold_heads(
        self, preferences: Tensor | Sequence[Preference], heads: Mapping[str, Head]
    ) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Folded heads of several tasks for many preferences, each factorised once.

        Args:
            preferences: (P, T), or a list of preferences.
            heads: Weight (K, k) and bias (K,) or None, by task.

        Yields:
            For consecutive chunks of preferences, as large as ``memory_cap`` allows: weight
            (p, K, d) and bias (p, K) by task.
        """
        P = as_preferences(preferences, self.tasks, strict=self.strict)
        check_heads(heads, self.statistics)
        chunk = self._chunk(len(P), rows=sum(len(H) for H, _ in heads.values()))
        yield from self._folder.folded(P, heads, chunk, self.bias)

    def front(self, a: str, b: str) -> EdgeFront:
        """All mixtures of two tasks at once, by one generalised eigenproblem.

        Args:
            a: One task.
            b: The other.

        Raises:
            KeyError: If a task is unknown.
            ValueError: If the metric is ``"head"`` or the scalarisation not linear.
        """
        for task in (a, b):
            if task not in self.statistics:
                raise KeyError(f"unknown task '{task}'; known: {self.tasks}.")
        plain = (self.metric, self.scalarization, self.aggregation)
        if plain != ("representation", "linear", "data_aware"):
            raise ValueError(
                f"a two-task front is for the linear representation metric, not {plain}: use "
                "solve_many(pairwise(...))."
            )
        check_widths({task: self.statistics[task] for task in (a, b)})
        fits = (self.fitted.mixed(a), self.fitted.mixed(b))
        return EdgeFront.of(fits, (self.fitted.scale(a), self.fitted.scale(b)))

    def _chunk(self, count: int, rows: int = 0) -> int:
        D = max(s.dim_merged for s in self.statistics.values()) + 1
        k = max(s.dim_expert for s in self.statistics.values())
        rows = max(rows, k) if self.metric == "head" or not rows else rows
        copies = 12 if self.metric == "head" else 4
        return max(1, min(count, self.memory_cap // (8 * copies * D * (D + rows))))
