"""Output-space projection: merging as least squares on what the layers put out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from lightning_merge.functional.bases import FREE, GIVEN, BasisName, Directions, make_basis
from lightning_merge.functional.coefficients import (
    SMALL_RIDGE,
    ChosenRidge,
    Ridge,
    searched_ridge,
    solve_system,
)
from lightning_merge.functional.preference import as_preference
from lightning_merge.functional.projection import joined_system
from lightning_merge.functional.quadratic import Constraint
from lightning_merge.layers.collecting import Collecting
from lightning_merge.layers.problem import LayerProblem, TaskScale
from lightning_merge.layers.sites import Kind
from lightning_merge.layers.statistics import LayerSums, Sampling
from lightning_merge.layers.streams import CacheOptions
from lightning_merge.methods.average import Average
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.calibrated import CalibratedMethod, Calibration
from lightning_merge.methods.layer_outcome import known_of_layer, layer_outcome
from lightning_merge.methods.layer_solution import (
    LayerInputs,
    LayerOptions,
    LayerReport,
    solve_layer,
    warn_of_reports,
)
from lightning_merge.methods.layerwise import LayerWalk
from lightning_merge.methods.outcome import Outcome, PlannedTreatment
from lightning_merge.methods.output_error import output_error
from lightning_merge.states import StateDict

ALL_KINDS: tuple[Kind, ...] = ("linear", "convolution", "attention", "norm", "embedding")


@final
@dataclass(frozen=True, kw_only=True)
class OutputProjection(CalibratedMethod):
    r"""Updates of the base whose layer outputs are nearest to the experts', layer by layer.

    .. math:: \min_{\alpha} \sum_t w_t \Big\|\sum_k \alpha_k B_k X_t - R_t\Big\|_F^2

    After "Model Merging by Output-Space Projection" (arXiv 2605.29101); what its public abstract
    leaves open is derived here, see ``docs/methods/output_projection.md``. Linear layers,
    convolutions and the projections of attentions get an update of the ``basis``; norms and
    embeddings are least squares of their own; all else is the fallback's.
    """

    basis: BasisName = "full"
    """``task``: one coefficient for each task vector and layer. ``task_global``: one for all
    layers (``mode=parallel``). ``row``: one for each output. ``rotated_row``: one for each
    direction of the outputs. ``block``: one for each block of rows. ``subspace``: any update of
    ``rank`` directions. ``span``: one for each included method. ``full``: any update."""
    mode: Literal["sequential", "parallel"] = "sequential"
    """Each layer on what the merged network gives it so far, or all on the experts' inputs."""
    targets: Literal["expert_output", "same_input"] = "expert_output"
    """In sequential mode: the expert's activations on its own way through the network, which also
    makes up for the drift of earlier layers, or its outputs on the very same inputs."""
    lower: float | None = None
    """Least value of every coefficient; null: none."""
    upper: float | None = None
    """Largest value of every coefficient; null: none."""
    total: float | None = None
    """Sum of the coefficients of a problem; null: any."""
    heuristics: tuple[WeightMethod, ...] = ()
    """Methods whose updates join the basis, so that none is better on the calibration inputs."""
    preference: dict[str, float] | None = None
    """Weight of each task; null: all alike."""
    task_scale: TaskScale = "per_energy"
    """What makes tasks comparable: relative errors, errors a column, or sums."""
    ridge: Ridge = None
    """Pull to the average, relative to the mean curvature; ``auto``: least error on folds left out;
    without folds (``num_folds`` null, or samples in one alone) least generalised
    cross-validation; null: 1e-3 for free matrices, 1e-6 for coefficients."""
    layers: tuple[Kind, ...] = ALL_KINDS
    """Kinds of layers that are solved."""
    fallback: WeightMethod | None = None
    """Merges all else; null: the average, weighted by the preference."""
    safeguard: bool = True
    """Where a heuristic has a lower error than the solution has on folds left out, it is kept."""
    sweeps: int = 1
    """Passes through the layers in sequential mode; the one whose representation is nearest to
    the experts' on a fold left out is kept."""
    directions: Directions = "residual"
    """Of ``rotated_row`` and ``subspace``: eigenvectors of the residuals' second moments, of the
    part any linear update can reach (the best for ``subspace``), or the outputs themselves."""
    rank: int | None = None
    """Directions of ``subspace``; null: a quarter of the outputs."""
    num_blocks: int = 8
    """Blocks of ``block``, such as heads."""
    num_folds: int | None = 5
    """Folds for the safeguard and ``ridge=auto``; null: none, a fifth of the memory, and the ridge
    by generalised cross-validation."""
    samples: int | None = None
    """At most as many calibration inputs of each task, evenly spread; null: all. The time is
    proportional to their number."""
    tokens_per_sample: int | None = 64
    """At most as many columns (tokens, patches) of each sample, drawn by a hash; null: all."""
    seed: int = 0
    """Of the draw."""
    max_inputs: int = 8192
    """Layers with more inputs of an output are solved from the outputs of the updates in the basis
    (``task``, ``task_global``, ``row``, ``block``, ``span``), or left to the fallback, with a
    warning: second moments of their inputs would not fit."""
    cache_gigabytes: float = 4.0
    """Host memory for inputs of the current block; above it, every layer takes whole passes."""

    def __post_init__(self) -> None:
        known = BasisName.__args__  # type: ignore[attr-defined]
        if self.basis not in known:
            raise ValueError(f"basis={self.basis!r}: expected one of {known}.")
        if isinstance(self.ridge, (int, float)) and not 0 <= self.ridge < math.inf:
            raise ValueError(f"ridge={self.ridge}: expected a finite number of at least 0.")
        if self.basis in FREE and not self.constraint.is_free:
            raise ValueError(
                f"basis='{self.basis}' has no coefficients to constrain: leave lower, upper and "
                "total null, or choose task, row or block."
            )
        if self.basis == "span" and not self.heuristics:
            raise ValueError("basis='span' needs methods to span it: give heuristics=[...].")
        if self.basis == "task_global" and self.mode == "sequential":
            raise ValueError(
                "basis='task_global' shares its coefficients between layers, so all must be known "
                "at once: choose mode='parallel'."
            )
        if self.sweeps < 1 or (self.sweeps > 1 and self.mode == "parallel"):
            raise ValueError(f"sweeps={self.sweeps}: expected 1, or more in sequential mode.")
        if self.sweeps > 1 and self.num_folds is None:
            raise ValueError("sweeps > 1 are compared on a fold left out: give num_folds.")
        _ = self._collecting  # checks the sampling

    @property
    def constraint(self) -> Constraint:
        """The feasible coefficients."""
        return Constraint(lower=self.lower, upper=self.upper, total=self.total)

    def merge(
        self, base: StateDict, experts: Mapping[str, StateDict], calibration: Calibration
    ) -> dict[str, Tensor]:
        """Merge the experts into one state dict; arguments and result as in ``WeightMethod``.

        Raises:
            ValueError: If keys or shapes differ, inputs of a task are missing or give values that
                are not finite, constraints are infeasible, or a layer's weight is computed from
                others.
        """
        return self.project(base, experts, calibration)[0]

    def project(
        self, base: StateDict, experts: Mapping[str, StateDict], calibration: Calibration
    ) -> tuple[dict[str, Tensor], list[LayerReport]]:
        """Merge as :meth:`merge` does, and tell what happened to each layer."""
        return _Solver(self, base, experts, calibration).solved()

    def outcome(
        self, base: StateDict, experts: Mapping[str, StateDict], calibration: Calibration
    ) -> Outcome:
        """Merge as :meth:`merge` does, with the reports of :meth:`project` as plain data."""
        solver = _Solver(self, base, experts, calibration)
        state, reports = solver.solved()
        return layer_outcome(state, solver.walk, reports)

    def known_treatment(self, name: str, shape: tuple[int, ...], kind: str) -> PlannedTreatment:
        """What no layer of these kinds can hold is the fallback's."""
        return known_of_layer(
            self.fallback or Average(),
            self.layers,
            name,
            shape,
            kind,
            bias=True,
            renormalised=self.mode == "sequential" and "norm" in self.layers,
        )

    def solve(
        self,
        base: StateDict,
        experts: Mapping[str, StateDict],
        calibration: Calibration,
        statistics: Mapping[str, Sequence[LayerSums]],
    ) -> tuple[dict[str, Tensor], list[LayerReport]]:
        """Merge in parallel mode from statistics, with no pass over the inputs.

        Another preference, basis, ridge or constraint is solved from the same statistics. Those of
        layers with more than ``max_inputs`` inputs hold the outputs of the heuristics and of the
        fallback they were collected with, and serve these alone.

        Args:
            base: The pre-trained weights.
            experts: Fine-tuned weights by task.
            calibration: As they were collected with.
            statistics: What :meth:`statistics` gave.

        Raises:
            ValueError: If they lack a layer, or the outputs of a heuristic in a wide layer.
        """
        return _Solver(self, base, experts, calibration).parallel(statistics)

    def statistics(
        self, base: StateDict, experts: Mapping[str, StateDict], calibration: Calibration
    ) -> dict[str, list[LayerSums]]:
        """Sums of the experts' inputs by layer, each a list over tasks: one pass a task."""
        return _Solver(self, base, experts, calibration).walk.expert_statistics()

    @property
    def _collecting(self) -> Collecting:
        sampling = Sampling(
            samples=self.samples,
            num_folds=self.num_folds,
            tokens_per_sample=self.tokens_per_sample,
            seed=self.seed,
        )
        wanted = self.basis in ("rotated_row", "subspace") and self.directions == "residual"
        return Collecting(sampling=sampling, bias=True, residual_gram=wanted)

    def _options(self) -> LayerOptions:
        return LayerOptions(
            basis=self.basis,
            ridge=self.ridge,
            constraint=self.constraint,
            directions=self.directions,
            rank=self.rank,
            num_blocks=self.num_blocks,
            safeguard=self.safeguard,
        )


@dataclass(frozen=True, eq=False)
class Shared:
    """What all layers share."""

    coefficients: Tensor
    """(E,), of the task vectors and the heuristics."""
    ridge: ChosenRidge


class _Solver:
    """One merge: the walk through the layers, and the report that grows with it."""

    def __init__(
        self,
        method: OutputProjection,
        base: StateDict,
        experts: Mapping[str, StateDict],
        calibration: Calibration,
    ) -> None:
        self.method = method
        self.preference = as_preference(
            method.preference or dict.fromkeys(experts, 1.0), list(experts)
        )
        elements = len(method.heuristics) + (0 if method.basis == "span" else len(experts))
        method.constraint.check(elements)
        self.walk = LayerWalk(
            base,
            experts,
            calibration,
            method.fallback or Average(weights=self._average_weights(experts)),
            method.layers,
            method._collecting,
            max_inputs=method.max_inputs,
            heuristics=method.heuristics,
            solve_wide=method.basis in GIVEN,
        )
        self.reports: list[LayerReport] = []

    def _average_weights(self, experts: Mapping[str, StateDict]) -> dict[str, float] | None:
        if self.method.preference is None:
            return None
        return dict(zip(experts, self.preference.tolist(), strict=True))

    def solved(self) -> tuple[dict[str, Tensor], list[LayerReport]]:
        """All layers, in the method's mode."""
        if self.method.mode == "sequential":
            return self.sequential()
        return self.parallel(self.walk.expert_statistics())

    def sequential(self) -> tuple[dict[str, Tensor], list[LayerReport]]:
        """Layer by layer, perhaps several times; the best sweep counts."""
        method, walk = self.method, self.walk
        cache = CacheOptions(limit_gigabytes=method.cache_gigabytes)
        best: tuple[float, dict[str, Tensor], list[LayerReport]] | None = None
        network: nn.Module | None = None
        for _ in range(method.sweeps):
            self.reports = []
            network = walk.one_by_one(
                self.solve,
                expert_targets=method.targets == "expert_output",
                cache=cache,
                start=network,
                skip_fold=0 if method.sweeps > 1 else None,
            )
            if method.sweeps == 1:
                break
            error = output_error(
                network, walk.calibration, list(walk.experts), self.preference, method.num_folds
            )
            if best is None or error < best[0]:
                state = {name: value.clone() for name, value in walk.finished().items()}
                best = (error, state, self.reports)
        warn_of_reports(self.reports, method.basis, method.ridge)
        return (walk.finished(), self.reports) if best is None else best[1:]

    def parallel(
        self, statistics: Mapping[str, Sequence[LayerSums]]
    ) -> tuple[dict[str, Tensor], list[LayerReport]]:
        """All layers from the sums of the experts' inputs."""
        walk = self.walk
        missing = [site.name for site in walk.sites if site.name not in statistics]
        if missing:
            raise ValueError(
                f"the statistics lack {len(missing)} layers, such as {', '.join(missing[:5])}: "
                "collect them with this basis, layers and max_inputs."
            )
        shared = self._global(statistics) if self.method.basis == "task_global" else None
        for site in walk.sites:
            problem = walk.problem(site, statistics[site.name])
            walk.write(problem, self.solve(problem, shared))
        warn_of_reports(self.reports, self.method.basis, self.method.ridge)
        return walk.finished(), self.reports

    def solve(self, problem: LayerProblem, shared: Shared | None = None) -> Tensor:
        """The update of one layer, from coefficients of all layers where there are such."""
        inputs = self._inputs(problem)
        options = self.method._options().for_kind(problem.site.kind)
        if shared is not None and options.basis == "task_global":
            update = torch.tensordot(shared.coefficients, self._elements(inputs), 1)
            report = LayerReport(
                name=inputs.name,
                basis="task_global",
                captured=inputs.total.captured(update),
                held_out=math.nan,
                heuristics={n: inputs.total.captured(u) for n, u in inputs.heuristics.items()},
                ridge=shared.ridge.value,
                rank=-1,
                unknowns=len(shared.coefficients),
                kept="solution",
                coefficients=tuple(shared.coefficients.tolist()),
                ridge_source=shared.ridge.source,
            )
        else:
            update, report = solve_layer(inputs, options)
        self.reports.append(report)
        return update

    def _elements(self, inputs: LayerInputs) -> Tensor:
        included = list(inputs.heuristics.values())[1:]
        return torch.cat([inputs.deltas, *(update[None] for update in included)])

    def _global(self, statistics: Mapping[str, Sequence[LayerSums]]) -> Shared:
        """Coefficients that all layers share, from the sum of their systems."""
        totals, by_fold, observations = [], [], 0.0
        for site in self.walk.sites:
            if self.method._options().for_kind(site.kind).basis != "task_global":
                continue
            inputs = self._inputs(self.walk.problem(site, statistics[site.name]))
            basis = make_basis("task", inputs.total, self._elements(inputs))
            totals.append(basis.system(inputs.total))
            by_fold.append([basis.system(fold) for fold in inputs.folds])
            observations += inputs.observations
        total = joined_system(totals)
        start = torch.zeros_like(total.cross)
        start[0, 0, : len(self.preference)] = self.preference
        ridge = self.method.ridge
        if ridge == "auto":
            folds = [joined_system(layers) for layers in zip(*by_fold, strict=True)]
            splits = [(total.minus(fold), fold, start) for fold in folds if fold.energy > 0]
            chosen = searched_ridge(total, start, splits, observations, SMALL_RIDGE)
        elif ridge is None:
            chosen = ChosenRidge(SMALL_RIDGE, "default")
        else:
            chosen = ChosenRidge(float(ridge), "given")
        found = solve_system(total, start, chosen.value, self.method.constraint)
        return Shared(found[0, 0], chosen)

    def _inputs(self, problem: LayerProblem) -> LayerInputs:
        weights = problem.weights(self.preference.tolist(), self.method.task_scale)
        total, folds = problem.weighted(weights)
        return LayerInputs(
            name=problem.site.name,
            total=total,
            folds=folds,
            deltas=problem.deltas,
            heuristics=self.walk.updates(problem),
            preference=self.preference,
            observations=problem.observations(weights),
        )
