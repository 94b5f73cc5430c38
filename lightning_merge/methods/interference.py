"""The merge report: how the experts interfere, layer by layer, and what each parameter gets."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from lightning_merge.functional.interference import (
    Interference,
    InterferenceSums,
    interference_sums,
    singular_cost,
)
from lightning_merge.functional.task_arithmetic import task_vectors_of
from lightning_merge.methods.base import MergeMethod, WeightMethod
from lightning_merge.methods.layers import group_names
from lightning_merge.methods.outcome import PlannedTreatment
from lightning_merge.methods.plan import PlannedParameter, plan, plan_plainly, treatments
from lightning_merge.methods.unmoved import unmoved
from lightning_merge.methods.walk import stack_parameter
from lightning_merge.states import STATISTIC_SUFFIXES, StateDict

ReportDepth: TypeAlias = Literal["full", "brief", "off"]

BUDGET = 5e10
"""Floating-point operations that the singular directions of a report may cost: some seconds."""
MOST_LAYERS = 48
"""Rows of the table in a manifest; the report of a larger model is grouped by block."""
MOST_PAIRS = 28
"""Cosines of pairs in a row of that table (8 tasks); beyond, their mean and extremes alone."""
MOST_NAMES = 12
"""Parameters of each kind that a manifest names."""


@final
@dataclass(frozen=True, kw_only=True)
class MeasuredParameter:
    """One parameter: what it gets, and how the task vectors interfere in it."""

    planned: PlannedParameter
    sums: InterferenceSums | None
    """None for integers, running statistics and tied names, which have no task vectors."""


Measured: TypeAlias = tuple[PlannedParameter, InterferenceSums]
"""A parameter with task vectors, and its sums."""


@final
@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What :func:`merge_report` measured."""

    tasks: tuple[str, ...]
    parameters: list[MeasuredParameter]
    """Every parameter of the base, in its order."""
    planned: bool
    """Whether it is known what each parameter gets; of a method with data it is after the merge."""

    def table(self) -> list[dict[str, Any]]:
        """One row of plain data for each parameter with a task vector, none left out."""
        return [
            {"layer": planned.name, "treatment": planned.treatment, **self._row([(planned, sums)])}
            for planned, sums in self._measured
        ]

    def layers(self, most: int = MOST_LAYERS) -> list[dict[str, Any]]:
        """One row of plain data for each layer, or each block where there are more than ``most``.

        A row holds ``norms`` and ``relative_norms`` by task, ``cosines`` of the pairs of tasks in
        the order (1, 2), (1, 3), ..., (2, 3), ..., ``sign_conflict``, and
        ``singular_interference`` and ``condition`` where they were measured.
        """
        measured = {planned.name: (planned, sums) for planned, sums in self._measured}
        groups = group_names(list(measured), most)
        return [
            {"layer": layer, **self._row([measured[name] for name in names])}
            for layer, names in groups.items()
        ]

    def total(self) -> dict[str, Any]:
        """The same row for the whole model."""
        return self._row(self._measured)

    def fallback(self, names: int = MOST_NAMES) -> dict[str, Any]:
        """Parameters that do not get the method itself, by what they get instead.

        ``mean``: the mean of the task vectors, of a method for matrices; ``average``: the
        experts' average; ``fallback``: merged by the method that this one leaves it to; ``base``:
        the base's value. At most ``names`` are named of each.
        """
        found: dict[str, Any] = {}
        for kind in ("mean", "average", "fallback", "base") if self.planned else ():
            chosen = [p.planned for p in self.parameters if p.planned.treatment == kind]
            if chosen:
                found[kind] = {
                    "parameters": len(chosen),
                    "entries": sum(p.size for p in chosen),
                    "names": [p.name for p in chosen[:names]],
                }
        return found

    def under(
        self, method: MergeMethod, got: Mapping[str, PlannedTreatment] | None = None
    ) -> "MergeReport":
        """The same measurements with what another method would give each parameter.

        Args:
            method: The method.
            got: Of a method with data: what parameters got that it did not merge itself.
        """
        planned = [p.planned for p in self.parameters]
        if isinstance(method, WeightMethod):
            changed = treatments(method, planned, len(self.tasks))
        elif got is not None:
            changed = [got.get(parameter.name, "method") for parameter in planned]
        else:
            return replace(self, planned=False)
        parameters = [
            replace(parameter, planned=replace(parameter.planned, treatment=treatment))
            for parameter, treatment in zip(self.parameters, changed, strict=True)
        ]
        return replace(self, parameters=parameters, planned=True)

    def in_order(self, names: Sequence[str]) -> "MergeReport":
        """The same with the parameters in another order: a file has them by name."""
        place = {name: index for index, name in enumerate(names)}
        return replace(
            self, parameters=sorted(self.parameters, key=lambda p: place[p.planned.name])
        )

    def distances(self) -> dict[str, float]:
        """Median over the matrices of each task vector's norm relative to the base's, by task.

        Fine-tuning gives well below 1; an expert of another base, about 1 or more.
        """
        rows = [
            sums.ratios().relative_norms
            for planned, sums in self._measured
            if len(planned.shape) > 1 and planned.size
        ]
        return {
            task: statistics.median(row[index] for row in rows) if rows else 0.0
            for index, task in enumerate(self.tasks)
        }

    def strangers(self) -> list[str]:
        """A message for each expert that seems to come from another base."""
        return [
            f"expert '{task}' is implausibly far from the base (median relative distance "
            f"{distance:.2f}, fine-tuning gives well below 1): it may come from another base, and "
            "its task vector then means nothing. Fine-tune it from this base, or leave it out."
            for task, distance in self.distances().items()
            if distance > 1
        ]

    def unmoved(self) -> list[str]:
        """A message for each expert that is the base, or one if all of them are."""
        norms = self.total()["norms"]
        same = [task for task, norm in zip(self.tasks, norms, strict=True) if norm == 0]
        return unmoved(self.tasks, same)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a manifest, of bounded size; :meth:`table` has everything."""
        measured = {"distances": self.distances(), "total": self.total(), "layers": self.layers()}
        return {"tasks": list(self.tasks), **measured, "fallback": self.fallback()}

    @property
    def _measured(self) -> list[Measured]:
        return [(p.planned, p.sums) for p in self.parameters if p.sums is not None]

    def _row(self, group: Sequence[Measured]) -> dict[str, Any]:
        found = reduce(add, (sums for _, sums in group), _no_sums(len(self.tasks))).ratios()
        pairs = _pairs(found)
        row = {
            "parameters": len(group),
            "entries": sum(planned.size for planned, _ in group),
            "norms": [_short(x) for x in found.norms],
            "relative_norms": [_short(x) for x in found.relative_norms],
            "cosine": {
                "mean": _short(statistics.fmean(pairs)) if pairs else 0.0,
                "lowest": _short(min(pairs, default=0.0)),
                "highest": _short(max(pairs, default=0.0)),
            },
            "sign_conflict": _short(found.sign_conflict),
        }
        if len(pairs) <= MOST_PAIRS:
            row["cosines"] = [_short(x) for x in pairs]
        if found.singular is not None:
            row["singular_interference"] = _short(found.singular)
        if found.condition is not None:
            row["condition"] = _short(found.condition)
        return row


def merge_report(
    base: StateDict,
    experts: Mapping[str, StateDict],
    method: MergeMethod | None = None,
    *,
    singular: bool = True,
    budget: float = BUDGET,
    progress: Callable[[list[str]], Iterable[str]] = iter,
) -> MergeReport:
    """Measure how the experts interfere in every parameter, one parameter at a time.

    Args:
        base: The pre-trained weights.
        experts: Fine-tuned weights by task.
        method: Tells what each parameter gets; its coefficients do not enter the measurements.
        singular: Measure the singular task interference of matrices too.
        budget: Floating-point operations that this may cost. Where all matrices cost more, every
            second, third, ... one is measured, so that the whole depth is covered.
        progress: Called with the names of the parameters; passes them on, and shows a bar.

    Raises:
        ValueError: If the experts do not fit the base, or a value is not finite.
    """
    if isinstance(method, WeightMethod):
        planned = plan(method, base, experts)
    else:
        planned = plan_plainly(base, experts)
    chosen = affordable_matrices(planned, len(experts), budget) if singular else frozenset[str]()
    by_name = {parameter.name: parameter for parameter in planned}
    parameters = [
        MeasuredParameter(
            planned=by_name[name],
            sums=_sums(by_name[name], base, experts, singular=name in chosen),
        )
        for name in progress(list(by_name))
    ]
    return MergeReport(
        tasks=tuple(experts), parameters=parameters, planned=isinstance(method, WeightMethod)
    )


def affordable_matrices(
    planned: Iterable[PlannedParameter], num_experts: int, budget: float
) -> frozenset[str]:
    """Names of the matrices whose singular directions are measured: all, or every n-th one."""
    costs = {p.name: singular_cost(p.shape, num_experts) for p in planned if _has_vectors(p)}
    names = [name for name, cost in costs.items() if 0 < cost <= budget]
    step = 1
    while sum(costs[name] for name in names[::step]) > budget:
        step += 1
    return frozenset(names[::step])


def _has_vectors(parameter: PlannedParameter) -> bool:
    statistic = parameter.name.rpartition(".")[2] in STATISTIC_SUFFIXES
    return parameter.kind == "floating" and parameter.tied_to is None and not statistic


def _sums(
    parameter: PlannedParameter,
    base: StateDict,
    experts: Mapping[str, StateDict],
    *,
    singular: bool,
) -> InterferenceSums | None:
    if not _has_vectors(parameter):
        return None
    origin: Tensor = base[parameter.name].detach()
    stacked = stack_parameter(parameter.name, origin, experts, [1.0] * len(experts))
    return interference_sums(origin, task_vectors_of(origin, stacked), singular=singular)


def _no_sums(num_experts: int) -> InterferenceSums:
    gram = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    return InterferenceSums(gram=gram, base_square=0.0, shared=0, conflicts=0)


def _pairs(found: Interference) -> list[float]:
    count = len(found.norms)
    return [found.cosines[i][j] for i in range(count) for j in range(i + 1, count)]


def _short(value: float) -> float:
    return float(f"{value:.5g}")
