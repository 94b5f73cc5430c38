"""Hyper-parameters of the closed-form correction, apart from the statistics it solves."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from lightning_merge.correction.checks import Head
from lightning_merge.correction.closed_form import ClosedFormCorrection, Metric
from lightning_merge.correction.head_maps import HeadMetric, decouple
from lightning_merge.correction.statistics import CorrectionStatistics


@dataclass(frozen=True, kw_only=True)
class CorrectionOptions:
    """Choices of the correction; the arguments of ``ClosedFormCorrection`` but for the data."""

    beta: float | Literal["auto"] = "auto"
    """Strength of the pull to the prior, in units of ``beta_mode``; auto: by cross-validation."""
    beta_mode: Literal["relative", "per_sample", "absolute"] = "relative"
    """Unit of beta: the mean feature energy, the number of samples, or none (the paper's)."""
    prior: Literal["auto", "procrustes", "scaled", "identity", "svd"] = "auto"
    """Map that the correction is pulled to: a rotation completed by the identity, its best
    multiple, the identity, a plain decomposition (the paper's); auto: by cross-validation."""
    task_scale: Literal["none", "per_sample", "per_energy", "per_gap"] = "per_energy"
    """What equal preference weighs alike: sums (the paper's), means, or relative errors."""
    bias: Literal["none", "shared", "per_task"] = "none"
    """Whether the correction has a bias."""
    metric: Literal["auto", "representation", "head"] = "auto"
    """Error that is minimised: of the representation (the paper's), or of what the heads read;
    auto: of what they read, unless they compete for directions, which takes long to solve."""
    scalarization: Literal["linear", "chebyshev"] = "linear"
    """How losses of tasks are traded: summed (the paper's), or the worst weighted one."""

    @classmethod
    def paper(cls) -> "CorrectionOptions":
        """The published recipe (arXiv 2511.10943): absolute β = 0.1 on raw sums, plain SVD."""
        return cls(
            beta=0.1,
            beta_mode="absolute",
            prior="svd",
            task_scale="none",
            metric="representation",
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; an infinite ridge is the string ``"inf"``."""
        options = asdict(self)
        return options | ({"beta": "inf"} if self.beta == math.inf else {})

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "CorrectionOptions":
        """The inverse of :meth:`as_dict`; names that this release does not know are left out."""
        known = {option.name for option in fields(cls)}
        chosen = {name: value for name, value in options.items() if name in known}
        if chosen.get("beta") == "inf":
            chosen["beta"] = math.inf
        return cls(**chosen)

    def build(
        self,
        statistics: Mapping[str, CorrectionStatistics],
        heads: Mapping[str, Head],
        choices: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> ClosedFormCorrection:
        """Make the correction of some tasks.

        ``metric="auto"`` is settled here, for these heads: ``correction.metric`` says how.

        Args:
            statistics: Sums of every task's features.
            heads: First linear layer of every task's head: weight ``(K, k)`` and bias ``(K,)``.
            choices: What an earlier search chose, which is then not searched again.
        """
        metric = self._metric_for(heads)
        return ClosedFormCorrection(
            statistics,
            heads=heads if metric == "head" else None,
            choices=choices,
            **asdict(self) | {"metric": metric},
        )

    def _metric_for(self, heads: Mapping[str, Head]) -> Metric:
        if self.metric != "auto":
            return self.metric
        # Exact ratios of losses have a meaning only where there is a trade-off.
        settled = self.scalarization == "linear" and decouple(heads, HeadMetric())
        return "head" if settled else "representation"
