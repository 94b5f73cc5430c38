"""RegMean and RegMean++: the least-squares average of linear layers on their inputs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from lightning_merge.functional.preference import as_preference
from lightning_merge.functional.ridge import ridge_towards
from lightning_merge.layers.collecting import Collecting
from lightning_merge.layers.problem import LayerProblem
from lightning_merge.layers.sites import Kind
from lightning_merge.layers.statistics import Sampling
from lightning_merge.methods.average import Average
from lightning_merge.methods.calibrated import CalibratedMethod, Calibration
from lightning_merge.methods.layer_outcome import known_of_layer, layer_outcome
from lightning_merge.methods.layer_solution import LayerReport
from lightning_merge.methods.layerwise import LayerWalk
from lightning_merge.methods.outcome import Outcome, PlannedTreatment
from lightning_merge.states import StateDict


@final
@dataclass(frozen=True, kw_only=True)
class RegMean(CalibratedMethod):
    r"""Weights whose outputs are nearest to those of all experts on their own inputs.

    .. math:: W = \Big(\sum_t w_t W_t \tilde G_t + \gamma \bar W\Big)
        \Big(\sum_t w_t \tilde G_t + \gamma I\Big)^{-1}, \qquad
        \tilde G_t = a\,G_t + (1 - a)\,\mathrm{diag}(G_t), \quad G_t = X_t X_t^\top / n_t

    Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models" (arXiv
    2212.09849), Section 4. Linear layers, convolutions (through their patches, by group) and the
    projections of packed attentions are merged so; biases and all else are averaged. Columns of
    padding tokens are left out where the inputs have a mask.
    """

    off_diagonal: float = 0.9
    """a, from 0 (diagonal second moments) to 1."""
    inputs: Literal["expert", "merged"] = "expert"
    """Whose inputs of a layer count: the expert's own, all from one pass (RegMean), or those of
    the merged network with earlier layers merged already (RegMean++)."""
    ridge: float = 1e-6
    """Pull to the average, relative to the mean second moment; 0 keeps the average where inputs
    say nothing."""
    weights: dict[str, float] | None = None
    """Weight of each expert by task; null: all alike."""
    layers: tuple[Kind, ...] = ("linear", "convolution", "attention")
    """Layers that are merged so."""
    samples: int | None = None
    """At most as many calibration inputs of each task, evenly spread; null: all. The time is
    proportional to their number."""
    tokens_per_sample: int | None = 64
    """At most as many columns (tokens, patches) of each sample, drawn by a hash; null: all."""
    seed: int = 0
    """Of the draw."""
    max_inputs: int = 8192
    """Layers with more inputs of an output are averaged, with a warning."""

    def __post_init__(self) -> None:
        if not 0 <= self.off_diagonal <= 1:
            raise ValueError(f"off_diagonal={self.off_diagonal}: expected a number from 0 to 1.")
        if not 0 <= self.ridge < float("inf"):
            raise ValueError(f"ridge={self.ridge}: expected a finite number of at least 0.")
        _ = self._sampling  # checks it

    @property
    def _sampling(self) -> Sampling:
        return Sampling(
            samples=self.samples,
            num_folds=None,
            tokens_per_sample=self.tokens_per_sample,
            seed=self.seed,
        )

    def merge(
        self, base: StateDict, experts: Mapping[str, StateDict], calibration: Calibration
    ) -> dict[str, Tensor]:
        """Merge the experts into one state dict; arguments and result as in ``WeightMethod``.

        Raises:
            ValueError: If keys or shapes differ, weights or inputs of a task are missing, or a
                layer's inputs are not finite.
        """
        return self.outcome(base, experts, calibration).state

    def outcome(
        self, base: StateDict, experts: Mapping[str, StateDict], calibration: Calibration
    ) -> Outcome:
        """Merge as :meth:`merge` does, and tell what was captured of each layer."""
        tasks = list(experts)
        weights = None if self.weights is None else {t: self.weights.get(t, 0.0) for t in tasks}
        preference = as_preference(self.weights or dict.fromkeys(tasks, 1.0), tasks)
        walk = LayerWalk(
            base,
            experts,
            calibration,
            Average(weights=weights),
            self.layers,
            Collecting(sampling=self._sampling, bias=False),
            off_diagonal=self.off_diagonal,
            max_inputs=self.max_inputs,
        )

        reports: list[LayerReport] = []

        def solve(problem: LayerProblem) -> Tensor:
            update, fallback = self.update(problem, preference), walk.updates(problem)["fallback"]
            reports.append(self._report(problem, preference, update, fallback))
            return update

        if self.inputs == "merged":
            walk.one_by_one(solve, expert_targets=False)
        else:
            statistics = walk.expert_statistics()
            for site in walk.sites:
                problem = walk.problem(site, statistics[site.name])
                walk.write(problem, solve(problem))
        return layer_outcome(walk.finished(), walk, reports)

    def known_treatment(self, name: str, shape: tuple[int, ...], kind: str) -> PlannedTreatment:
        """Biases, and what no layer of these kinds can hold, are averaged."""
        return known_of_layer(
            Average(), self.layers, name, shape, kind, bias=False, renormalised=False
        )

    def _report(
        self, problem: LayerProblem, preference: Tensor, update: Tensor, fallback: Tensor
    ) -> LayerReport:
        total, _ = problem.weighted(problem.weights(preference.tolist(), "per_sample"))
        return LayerReport(
            name=problem.site.name,
            basis="full",
            captured=total.captured(update),
            held_out=math.nan,
            heuristics={"fallback": total.captured(fallback)},
            ridge=self.ridge,
            rank=-1,
            unknowns=update[0].numel(),
            kept="solution",
        )

    def update(self, problem: LayerProblem, preference: Tensor) -> Tensor:
        """The update of one layer, (g, o, i), for a preference (T,) that sums to one."""
        scaled = problem.weights(preference.tolist(), "per_sample")
        total, _ = problem.weighted(scaled)
        average = torch.tensordot(preference, problem.deltas, 1)
        unit = float(total.gram.diagonal(dim1=-2, dim2=-1).mean())
        return ridge_towards(total.cross, total.gram, average, self.ridge * unit)
