"""The linear system of one task: what it contributes to every query."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lightning_merge.correction.choice import BetaMode, Choice, beta_unit, prior_matrix
from lightning_merge.correction.moments import Moments
from lightning_merge.functional.ridge import ridge_towards

Bias = Literal["none", "shared", "per_task"]

MIXING_CAP = 1.0
"""Largest relative ridge that a *searched* choice ever brings into a mixture of tasks."""


@dataclass(frozen=True, eq=False)
class TaskFit:
    r"""Curvature :math:`C_t` and target :math:`N_t = W_t C_t` of one task.

    :math:`L_t(W) = \|(W - W_t)\,C_t^{1/2}\|_F^2 + L_t(W_t)` with :math:`C_t = G_t + \beta_t I` and
    :math:`N_t = A_t + \beta_t W_{0,t}`. With a shared bias all are bordered: features are
    ``[z; 1]``, maps are ``[W, b]``, and the bias is not penalised; D is then d + 1, else D = d.

    A ridge that was *searched* and came out large means that the samples of this task say little
    beyond its prior. Taken literally it would bind all other tasks to that prior too, so such a fit
    keeps its own solution :math:`W_t` and enters mixtures with :math:`\beta_t` capped
    (:mod:`~lightning_merge.correction.mixing`). A ridge that the caller gave is taken literally.
    """

    task: str
    choice: Choice
    total: Moments
    """Uncentred moments of all samples."""
    bias: Bias
    beta_mode: BetaMode
    given: Tensor | None = None
    proper: bool = False
    refine: bool = True
    capped: bool = False
    """Whether mixtures see a bounded ridge; after a search they always do."""
    mixing_cap: float = MIXING_CAP
    """The bound, in units of tr(G)/d."""

    @cached_property
    def fitted(self) -> Moments:
        """The moments that prior and ridge refer to: centred where there is a bias."""
        return self.total if self.bias == "none" else self.total.centred()

    @cached_property
    def prior(self) -> Tensor:
        """The prior W0, (k, d)."""
        return prior_matrix(
            self.choice, self.fitted, given=self.given, proper=self.proper, refine=self.refine
        )

    @cached_property
    def unit(self) -> float:
        """Absolute ridge of ``beta = 1``."""
        return beta_unit(self.beta_mode, self.fitted)

    @property
    def beta(self) -> float:
        """The ridge in absolute terms; 0 and infinity are limits."""
        return self.choice.beta * self.unit if self.choice.beta else 0.0

    @cached_property
    def ridge(self) -> float:
        """The ridge in mixtures of tasks: finite where it is capped."""
        if not (self.choice.searched or self.capped):
            return self.beta
        return min(self.beta, self.mixing_cap * beta_unit("relative", self.fitted))

    @cached_property
    def design(self) -> Moments:
        """The moments in the normal equations."""
        return self.total if self.bias == "shared" else self.fitted

    @cached_property
    def curvature(self) -> Tensor:
        """C, (D, D); without a ridge if the ridge is infinite."""
        ridge = 0.0 if math.isinf(self.ridge) else self.ridge
        gram = self.design.gram + ridge * torch.eye(len(self.design.gram)).to(self.design.gram)
        if self.bias != "shared":
            return gram
        column = self.design.sum_merged[:, None]
        corner = torch.full((1, 1), self.design.n).to(gram)
        return torch.cat([torch.cat([gram, column], 1), torch.cat([column.T, corner], 1)])

    @cached_property
    def target(self) -> Tensor:
        """N, (k, D)."""
        if self.ridge != self.beta:
            return self.own @ self.curvature
        if self.beta == 0 or math.isinf(self.beta):
            return self._bordered(self.design.cross)
        return self._bordered(self.design.cross + self.beta * self.prior)

    def _bordered(self, cross: Tensor) -> Tensor:
        if self.bias != "shared":
            return cross
        return torch.cat([cross, self.design.sum_expert[:, None]], 1)

    @cached_property
    def own(self) -> Tensor:
        """W_t, or [W_t, b_t] with a shared bias: the best map of this task alone, (k, D)."""
        moments = self.fitted
        W = ridge_towards(moments.cross, moments.gram, self.prior, self.beta)
        if self.bias != "shared":
            return W
        return torch.cat([W, self.offset(W)[:, None]], 1)

    def offset(self, weight: Tensor) -> Tensor:
        """Bias of this task for a map (..., k, d): its mean residual, (..., k)."""
        return self.total.mean_expert - weight @ self.total.mean_merged

    def split(self, maps: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight (..., k, d) and bias (..., k) of maps (..., k, D), for this task."""
        if self.bias == "shared":
            return maps[..., :-1], maps[..., -1]
        return maps, self.offset(maps) if self.bias == "per_task" else None

    def with_cap(self, cap: float) -> "TaskFit":
        """The same fit with another bound on its ridge in mixtures."""
        if cap == self.mixing_cap or not (self.choice.searched or self.capped):
            return self
        copy = replace(self, mixing_cap=cap)
        kept = ("fitted", "prior", "unit", "design", "own", "condition")
        copy.__dict__.update({name: self.__dict__[name] for name in kept if name in self.__dict__})
        return copy

    def refitted(self, total: Moments) -> "TaskFit":
        """The same choice on other samples; a prior for k < d is not refined, to save time."""
        return replace(self, total=total, refine=False)

    def excess(self, maps: Tensor, metric: Tensor | None = None) -> Tensor:
        r"""Loss above the best: :math:`\mathrm{tr}(S (W - W_t) C_t (W - W_t)^\top)`.

        Args:
            maps: (..., k, D).
            metric: S, (k, k); None is the identity.
        """
        difference = maps - self.own
        weighted = difference if metric is None else metric @ difference
        return ((difference @ self.curvature) * weighted).sum((-2, -1))

    @cached_property
    def condition(self) -> float:
        """Condition number of G + beta I; 1 for an infinite ridge."""
        if math.isinf(self.beta):
            return 1.0
        values = torch.linalg.eigvalsh(self.fitted.gram)
        low = float(values[0].clamp_min(0)) + self.beta
        return (float(values[-1]) + self.beta) / low if low > 0 else math.inf
