"""The closed-form correction: statistics and a preference in, one linear map out."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_merge.correction.choice import DEFAULT_BETA, BetaMode, Choice
from lightning_merge.correction.fit import Bias, TaskFit
from lightning_merge.correction.linear_map import LinearMap
from lightning_merge.correction.mixture import limit_map, mixed_maps, needs_limit
from lightning_merge.correction.statistics import CorrectionStatistics
from lightning_merge.functional.preference import Preference, as_preference, as_preferences

TaskScale = Literal["none", "per_sample", "per_energy", "per_gap"]
Prior = Literal["auto", "procrustes", "scaled", "identity", "svd"]
Head = tuple[Tensor, Tensor | None]


class ClosedFormCorrection:
    r"""Preference-controlled linear correction of a merged representation.

    For a preference p the map minimises

    .. math:: \sum_t p_t s_t \left(\|W Z_{m,t} - Z_{i,t}\|_F^2 + \beta_t \|W - W_{0,t}\|_F^2\right)

    as in "From Parameter to Representation" (ReACT, arXiv 2511.10943), where the scale is
    :math:`s_t = 1`, the ridge absolute and the prior a plain Procrustes solution
    (:meth:`paper`). Nothing is solved before it is asked for.

    Args:
        statistics: Statistics of each task, all from one merged backbone. The order is the order
            of preferences given as tensors.
        beta: Ridge in the units of ``beta_mode``, one for all tasks or one a task. 0 and infinity
            are limits.
        beta_mode: ``"relative"`` to the mean feature energy tr(G)/d; ``"per_sample"``;
            ``"absolute"`` on raw sums (the paper).
        prior: What the map is shrunk to: ``"procrustes"`` with the identity-anchored completion,
            ``"scaled"`` times its best factor, ``"identity"``, ``"svd"`` (the paper), or a matrix
            (k, d).
        anchor: Pull of the Procrustes prior to the identity, in units of tr(G)/d.
        task_scale: What equal preference means: ``"none"`` (the paper: sums of squares count),
            ``"per_sample"`` (mean squared errors), ``"per_energy"`` (relative errors) or
            ``"per_gap"`` (fractions of what can be recovered).
        bias: ``"none"`` (the paper), ``"shared"``, or ``"per_task"`` (one weight, each task its
            own bias, absorbed by its head).
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
        beta: float | Mapping[str, float] = DEFAULT_BETA,
        beta_mode: BetaMode = "relative",
        prior: Prior | Tensor = "procrustes",
        anchor: float = 0.0,
        task_scale: TaskScale = "per_energy",
        bias: Bias = "none",
        proper: bool = False,
        refine: bool = True,
        strict: bool | Literal["error"] = False,
        memory_cap: int = 256 * 2**20,
    ) -> None:
        _check_option("beta_mode", beta_mode, get_args(BetaMode))
        _check_option("task_scale", task_scale, get_args(TaskScale))
        _check_option("bias", bias, get_args(Bias))
        _check_statistics(statistics)
        self.statistics = dict(statistics)
        self.beta, self.beta_mode = beta, beta_mode
        self.prior, self.anchor = prior, anchor
        self.task_scale, self.bias = task_scale, bias
        self.proper, self.refine, self.strict = proper, refine, strict
        self.memory_cap = memory_cap
        self._fits: dict[str, TaskFit] = {}
        self._scales: dict[str, float] = {}
        for task in self.statistics:
            self._fixed_choice(task)

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
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order of preferences given as tensors."""
        return list(self.statistics)

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
        maps = torch.cat([self._maps(chunk) for chunk in P.split(self._chunk(P))])
        return self._as_linear_map(maps, task)

    def normal_equations(self) -> dict[str, tuple[Tensor, Tensor]] | None:
        """Both sides of every task's equation, scaled: W_p = (Σ p_t N_t)(Σ p_t C_t)^{-1}.

        Returns:
            N_t (k, d) and C_t (d, d) by task, in float64; None where no such form exists: with a
            bias, or in a limit of the ridge.
        """
        fits = [self._fit(task) for task in self.tasks]
        if self.bias != "none" or needs_limit(fits):
            return None
        return {
            fit.task: (self._scale(fit.task) * fit.target, self._scale(fit.task) * fit.curvature)
            for fit in fits
        }

    def fold(
        self, preference: Preference, task: str, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A task's linear head with the correction for a preference absorbed.

        Solves for the K rows of the head only.

        Args:
            preference: One preference, or (P, T) of them.
            task: Whose head it is.
            weight: H, (K, k).
            bias: c, (K,); None is zero.

        Returns:
            Weight (K, d) and bias (K,), or (P, K, d) and (P, K); float64, to be cast once.
        """
        many = isinstance(preference, Tensor) and preference.ndim == 2
        P = as_preferences(
            preference if many else [preference],  # type: ignore[arg-type]
            self.tasks,
            strict=self.strict,
        )
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
            For consecutive chunks of preferences, as large as :attr:`memory_cap` allows: weight
            (p, K, d) and bias (p, K) by task.
        """
        P = as_preferences(preferences, self.tasks, strict=self.strict)
        _check_heads(heads, self.statistics)
        wide = {
            task: weight.detach().to(self._device, torch.float64)
            for task, (weight, _) in heads.items()
        }
        stacked = torch.cat(list(wide.values()))
        for chunk in P.split(self._chunk(P, rows=len(stacked))):
            rows = self._maps(chunk, stacked).split([len(H) for H in wide.values()], dim=1)
            yield {
                task: self._folded(task, part, H, heads[task][1])
                for (task, H), part in zip(wide.items(), rows, strict=True)
            }

    def _folded(
        self, task: str, rows: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        offset = weight.new_zeros(len(weight)) if bias is None else bias.detach().to(weight)
        offset = offset.expand(len(rows), -1)
        if self.bias == "shared":
            return rows[..., :-1], offset + rows[..., -1]
        if self.bias == "per_task":
            total = self._fit(task).total
            return rows, offset + weight @ total.mean_expert - rows @ total.mean_merged
        return rows, offset

    def _as_linear_map(self, maps: Tensor, task: str | None) -> LinearMap:
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
        return LinearMap(maps, self._fit(task).offset(maps))

    def _maps(self, preferences: Tensor, heads: Tensor | None = None) -> Tensor:
        """Maps (P, k, D), or ``heads @ maps`` (P, K, D), for checked preferences (P, T)."""
        self._check_widths(preferences)
        used = preferences.any(0).tolist()
        fits = [self._fit(task) for task, flag in zip(self.tasks, used, strict=True) if flag]
        weights = self.weights(preferences)[:, preferences.any(0)].to(self._device)
        limits = [
            needs_limit([f for f, w in zip(fits, row, strict=True) if w > 0]) for row in weights
        ]
        if any(limits):
            return torch.cat([self._one_map(fits, row, heads) for row in weights])
        targets = None if heads is None else torch.stack([heads @ fit.target for fit in fits])
        return mixed_maps(fits, weights, targets)

    def _one_map(self, fits: list[TaskFit], weights: Tensor, heads: Tensor | None) -> Tensor:
        used = [fit for fit, w in zip(fits, weights, strict=True) if w > 0]
        w = weights[weights > 0]
        single = limit_map(used, w)[None] if needs_limit(used) else mixed_maps(used, w[None])
        return single if heads is None else heads @ single

    def weights(self, preferences: Tensor) -> Tensor:
        """Weights w_t = p_t s_t of the losses, (P, T), for checked preferences (P, T)."""
        used = preferences.any(0).tolist()
        scales = [
            self._scale(task) if flag else 0.0 for task, flag in zip(self.tasks, used, strict=True)
        ]
        return preferences * torch.tensor(scales, dtype=torch.float64)

    def _scale(self, task: str) -> float:
        if task not in self._scales:
            self._scales[task] = 1 / self._scale_denominator(task)
        return self._scales[task]

    def _scale_denominator(self, task: str) -> float:
        fit = self._fit(task)
        if self.task_scale == "none":
            return 1.0
        if self.task_scale == "per_sample":
            return fit.total.n
        if self.task_scale == "per_energy":
            if fit.fitted.energy > 0:
                return fit.fitted.energy
            raise ValueError(
                f"task '{task}': its expert features have no energy, so task_scale='per_energy' "
                "is not defined. Check the expert, or use task_scale='per_sample'."
            )
        return self._gap(task)

    def _gap(self, task: str) -> float:
        """What the task's own map recovers over doing nothing (k = d) or the equal mixture."""
        fit = self._fit(task)
        k, d = fit.total.cross.shape
        if math.isinf(fit.ridge):
            raise ValueError(f"task '{task}': task_scale='per_gap' needs a finite beta.")
        if k == d:
            reference = torch.eye(k, fit.curvature.shape[1]).to(fit.curvature)
        else:
            fits = [self._fit(other) for other in self.tasks]
            energies = torch.tensor([1 / f.fitted.energy for f in fits], dtype=torch.float64)
            reference = self._one_map(fits, energies, None)[0]
        gap = float(fit.excess(reference))
        if gap > 1e-12 * fit.fitted.energy:
            return gap
        raise ValueError(
            f"task '{task}': the correction has nothing to recover, so task_scale='per_gap' is not "
            "defined. Use task_scale='per_energy'."
        )

    def _fit(self, task: str) -> TaskFit:
        if task not in self._fits:
            statistics = self.statistics[task]
            if statistics.count == 0 or statistics.effective_count == 0:
                raise ValueError(
                    f"task '{task}' has a positive preference but no calibration samples. "
                    "Calibrate it, or give it preference 0."
                )
            total = statistics.total()
            if not bool(total.cross.any()):
                raise ValueError(
                    f"task '{task}': the expert and the merged features have no common energy, so "
                    "there is nothing to align. Check that both networks return features, not "
                    "zeros."
                )
            self._fits[task] = TaskFit(
                task=task,
                choice=self._fixed_choice(task),
                total=total,
                bias=self.bias,
                beta_mode=self.beta_mode,
                given=self.prior if isinstance(self.prior, Tensor) else None,
                proper=self.proper,
                refine=self.refine,
            )
        return self._fits[task]

    def _fixed_choice(self, task: str) -> Choice:
        beta = self.beta
        if isinstance(beta, Mapping):
            if set(beta) != set(self.statistics):
                raise ValueError(f"beta for {sorted(beta)}; expected one for each of {self.tasks}.")
            beta = beta[task]
        prior: Any = "given" if isinstance(self.prior, Tensor) else self.prior
        return Choice(prior=prior, anchor=self.anchor, beta=float(beta))

    def _check_widths(self, preferences: Tensor) -> None:
        used = preferences.any(0).tolist()
        widths = {
            task: self.statistics[task].dim_expert
            for task, flag in zip(self.tasks, used, strict=True)
            if flag
        }
        if len(set(widths.values())) > 1:
            raise ValueError(
                f"tasks of different expert widths have positive preference: {widths}. They share "
                "no map: ask for one-hot preferences, one at a time."
            )

    def _chunk(self, preferences: Tensor, rows: int = 0) -> int:
        D = max(s.dim_merged for s in self.statistics.values()) + 1
        rows = rows or max(s.dim_expert for s in self.statistics.values())
        return max(1, min(len(preferences), self.memory_cap // (8 * 4 * D * (D + rows))))

    @property
    def _device(self) -> torch.device:
        return next(iter(self.statistics.values())).device


def _is_limit(fits: list[TaskFit], weights: Tensor) -> bool:
    return needs_limit([fit for fit, w in zip(fits, weights, strict=True) if w > 0])


def _check_heads(heads: Mapping[str, Head], statistics: Mapping[str, CorrectionStatistics]) -> None:
    unknown = [task for task in heads if task not in statistics]
    if unknown:
        raise KeyError(f"heads of unknown tasks {unknown}; known: {list(statistics)}.")
    for task, (weight, bias) in heads.items():
        k = statistics[task].dim_expert
        found = (tuple(weight.shape), None if bias is None else tuple(bias.shape))
        if weight.ndim != 2 or weight.shape[1] != k or found[1] not in (None, found[0][:1]):
            raise ValueError(
                f"head of '{task}': weight {found[0]} and bias {found[1]}; expected (K, {k}) and "
                "(K,), the linear layer that reads the representation."
            )


def _check_option(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: expected one of {known}.")


def _check_statistics(statistics: Mapping[str, CorrectionStatistics]) -> None:
    if not statistics:
        raise ValueError("no statistics: a correction needs at least one task.")
    first_task, first = next(iter(statistics.items()))
    for task, other in statistics.items():
        mine = {"dim_merged": first.dim_merged, **first.metadata}
        theirs = {"dim_merged": other.dim_merged, **other.metadata}
        differing = [
            f"{key} {mine[key]!r} vs {theirs[key]!r}" for key in mine if mine[key] != theirs[key]
        ]
        if differing:
            raise ValueError(
                f"statistics of '{first_task}' and '{task}' are of different backbones: "
                f"{'; '.join(differing)}. Calibrate all tasks on one merged backbone."
            )
