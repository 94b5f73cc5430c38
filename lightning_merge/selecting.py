"""Choosing a merge without labels: by the cross-validated error of its correction."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

import torch
from torch import nn

from lightning_merge.correction import CorrectionOptions
from lightning_merge.correction.validation import HeldOutError, cross_validated_errors
from lightning_merge.functional.preference import Preference
from lightning_merge.merged import MergedModel
from lightning_merge.merging import (
    BatchNorm,
    SameBase,
    describe,
    measure,
    merge_experts,
)
from lightning_merge.methods import TIES, Average, IsoC, MergeMethod, TaskArithmetic, TSVMerge
from lightning_merge.methods.interference import MergeReport, ReportDepth
from lightning_merge.pool import ExpertPool
from lightning_merge.runtime import Runtime
from lightning_merge.sources import chosen_tasks, open_source

CORRECTIONS = (
    CorrectionOptions(),
    CorrectionOptions(metric="representation"),
    CorrectionOptions(metric="representation", prior="procrustes", beta=1e-2),
)
"""Corrections that are tried on every merge: both metrics, and a fixed ridge and prior."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One merge with one correction, and what it does to samples that it was not solved from."""

    method: MergeMethod
    correction: CorrectionOptions
    errors: Mapping[str, HeldOutError]
    """By task, measured behind the task's head: 0 is the expert, 1 as far off as a constant."""

    @property
    def error(self) -> float:
        """Mean over the tasks: what candidates are compared by, lower is better."""
        return fmean(error.corrected for error in self.errors.values())

    @property
    def uncorrected(self) -> float | None:
        """The same for the merge without its correction; None for unequal widths."""
        errors = [error.identity for error in self.errors.values()]
        return None if None in errors else fmean(error for error in errors if error is not None)

    def row(self) -> dict[str, Any]:
        """The candidate as plain data."""
        return {
            "method": describe(self.method),
            "correction": self.correction.as_dict(),
            "error": self.error,
            "uncorrected_error": self.uncorrected,
            "errors": {task: error.corrected for task, error in self.errors.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The merge that was kept, and all that were tried."""

    model: MergedModel
    """The best merge with its correction; its record holds the table."""
    candidates: list[Candidate] = field(default_factory=list)
    """Everything that was scored, best first."""

    @property
    def best(self) -> Candidate:
        """What was kept."""
        return self.candidates[0]

    @property
    def table(self) -> list[dict[str, Any]]:
        """Plain data, one row a candidate, best first."""
        return [candidate.row() for candidate in self.candidates]

    def summary(self, rows: int = 10) -> str:
        """The best candidates as lines of text."""
        shown = [
            f"{c.error:8.4f}  {'' if c.uncorrected is None else f'{c.uncorrected:.4f}':>11}  "
            f"{brief(c.method)}, {brief(c.correction)}"
            for c in self.candidates[:rows]
        ]
        return "\n".join(["   error  uncorrected  merge and correction", *shown])


def default_candidates(num_tasks: int) -> list[MergeMethod]:
    """What is tried by default: the base itself, several coefficients, and other methods.

    Args:
        num_tasks: Experts to merge; the coefficients are multiples of one over it.
    """
    scales = [factor / num_tasks for factor in (0.5, 1.5, 2.0, 3.0) if factor <= num_tasks]
    return [
        Average(),
        TaskArithmetic(scale=0.0),
        *(TaskArithmetic(scale=scale) for scale in scales),
        TIES(),
        TSVMerge(),
        IsoC(),
    ]


def select_from(
    select: bool | Sequence[MergeMethod], method: MergeMethod, num_tasks: int
) -> list[MergeMethod]:
    """Methods to try: those listed, or ``method`` and the default ones."""
    if not isinstance(select, bool):
        return list(select)
    defaults = default_candidates(num_tasks)
    return defaults if method in defaults else [method, *defaults]


def corrections_with(
    correction: CorrectionOptions | Literal["paper"] | None,
) -> list[CorrectionOptions]:
    """The default corrections to try, and another one.

    Raises:
        ValueError: If there is none: merges are selected by the error of their correction.
    """
    if correction is None:
        raise ValueError(
            "merges are selected by the error of their correction, and it is switched off: leave "
            "correction=None (--correction null) out, or don't select."
        )
    chosen = CorrectionOptions.paper() if correction == "paper" else correction
    return [chosen, *(other for other in CORRECTIONS if other != chosen)]


def select_merge(
    experts: ExpertPool | Mapping[str, nn.Module],
    candidates: Iterable[MergeMethod] | None = None,
    calibration: Mapping[str, Any] | None = None,
    *,
    corrections: Sequence[CorrectionOptions] = CORRECTIONS,
    preference: Preference | None = None,
    base: nn.Module | None = None,
    head: str | None = None,
    module: nn.Module | None = None,
    tasks: Sequence[str] | None = None,
    batch_norm: BatchNorm = "auto",
    batch_size: int = 128,
    device: torch.device | str | None = None,
    runtime: Runtime | None = None,
    report: ReportDepth = "full",
    same_base: SameBase = "warn",
) -> Selection:
    """Merge in several ways, score each without labels, and keep the best.

    The score of a merge with a correction is the error of what the heads read on calibration
    samples that the correction was not solved from, relative to what the experts' heads read and
    averaged over the tasks. It is exact K-fold cross-validation from the statistics: one pass over
    the inputs a merge, whatever the number of corrections, and no label.

    Args:
        experts: A pool; or fine-tuned networks by task, with ``base`` and ``head``.
        candidates: Methods to try; :func:`default_candidates` if None. ``TaskArithmetic(scale=0)``
            is the base itself.
        calibration: Unlabeled inputs by task; the pool's own by default.
        corrections: Corrections to try on every merge.
        preference: What the correction is solved for while it is scored; equal by default.
        base: As for :func:`~lightning_merge.merge_experts`.
        head: As for ``merge_experts``.
        module: As for ``merge_experts``.
        tasks: As for ``merge_experts``.
        batch_norm: As for ``merge_experts``.
        batch_size: As for ``merge_experts``.
        device: As for ``merge_experts``.
        runtime: As for ``merge_experts``; every process selects the same.
        report: As for ``merge_experts``; made once.
        same_base: As for ``merge_experts``.

    Returns:
        The merged model that was kept, whose record has the table under ``"selection"``, and all
        candidates, best first.

    Raises:
        ValueError: If there is no candidate, no correction, or too few calibration samples to
            leave some out.
    """
    names = list(tasks) if tasks else experts.tasks if isinstance(experts, ExpertPool) else experts
    methods = default_candidates(len(list(names))) if candidates is None else list(candidates)
    if not methods or not corrections:
        raise ValueError(
            f"nothing to select from: {len(methods)} methods and {len(corrections)} corrections. "
            "Give at least one of each."
        )
    source, _ = open_source(experts, calibration, base, head)
    measured: MergeReport | Literal["off"] = "off"
    if report != "off":
        lazily = {task: source.expert(task) for task in chosen_tasks(source, tasks)}
        where = runtime or Runtime(device=torch.device(device or "cpu"))
        measured = measure(source.base, lazily, report, same_base, where)
    scored: list[Candidate] = []
    best: tuple[float, MergedModel] | None = None
    for method in methods:
        model = merge_experts(
            experts,
            method,
            calibration,
            base=base,
            head=head,
            module=module,
            tasks=tasks,
            batch_norm=batch_norm,
            batch_size=batch_size,
            device=device,
            runtime=runtime,
            check=False,  # other corrections are tried on it
            report=measured,
        )
        for options in corrections:
            tried = replace(model, options=options)
            candidate = score_merge(tried, method, preference)
            scored.append(candidate)
            if best is None or candidate.error < best[0]:
                best = candidate.error, tried
    assert best is not None
    # Stable: of equals, the first one given.
    selection = Selection(model=best[1], candidates=sorted(scored, key=lambda c: c.error))
    best[1].record["selection"] = selection.table
    _warn_if_harmful(selection.best)
    return selection


def score_merge(
    model: MergedModel, method: MergeMethod, preference: Preference | None = None
) -> Candidate:
    """Held-out errors of one merged model behind its heads, from its statistics alone.

    Args:
        model: A merged model with statistics; scored under its own options.
        method: What it was merged by.
        preference: Which one the correction is solved for; equal by default.
    """
    wanted = dict.fromkeys(model.tasks, 1 / len(model.tasks)) if preference is None else preference
    errors = cross_validated_errors(model.correction, wanted, heads=model.linear_heads())
    return Candidate(method=method, correction=model.options, errors=errors)


def brief(choice: MergeMethod | CorrectionOptions) -> str:
    """A short name: the class and what differs from its defaults."""
    default = asdict(type(choice)())
    changed = {k: v for k, v in asdict(choice).items() if v != default[k] or k == "scale"}
    inside = ", ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in changed.items()
    )
    if isinstance(choice, CorrectionOptions):
        return inside or "default correction"
    return f"{type(choice).__name__}({inside})"


def _warn_if_harmful(best: Candidate) -> None:
    if best.uncorrected is not None and best.error > best.uncorrected - 1e-9:
        warnings.warn(
            f"the best of the candidates, {brief(best.method)}, is not improved by any correction "
            f"on samples left out (error {best.error:.3g} with, {best.uncorrected:.3g} without): "
            "use uncorrected(), or calibrate on more samples.",
            stacklevel=3,
        )
