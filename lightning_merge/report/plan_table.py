"""The dry run as text: what each parameter of a merge would get."""

from collections.abc import Mapping, Sequence

from lightning_merge.methods import CalibratedMethod, MergeMethod, WeightMethod
from lightning_merge.methods.plan import (
    PlannedParameter,
    peak_entries,
    plan,
    plan_plainly,
    plan_with_data,
)
from lightning_merge.states import StateDict

WORDS = {
    "mean": "mean of the task vectors",
    "average": "average of the experts",
    "fallback": "merged by the fallback",
    "base": "value of the base",
    "unknown": "decided with data",
}
"""What a treatment is called; the method has its own name."""


def plan_text(method: MergeMethod, base: StateDict, experts: Mapping[str, StateDict]) -> str:
    """What each parameter would get, one line each, and the totals; no value is read.

    Args:
        method: Of a method that needs data the table has what is known without a pass.
        base: The pre-trained weights.
        experts: Fine-tuned weights by task.

    Raises:
        ValueError: As the merge would for names, shapes, kinds and rules that do not fit.
    """
    name = type(method).__name__
    if isinstance(method, WeightMethod):
        planned = plan(method, base, experts)
    elif isinstance(method, CalibratedMethod):
        planned = plan_with_data(method, base, experts)
    else:
        planned = plan_plainly(base, experts)
    rows = [
        (p.name, "×".join(map(str, p.shape)) or "1", p.dtype, _gets(p, name), _coefficients(p))
        for p in planned
    ]
    lines = [
        f"{name} of {len(experts)} experts ({', '.join(experts)}); nothing is written.",
        "",
        *_aligned([("parameter", "shape", "dtype", "gets", "coefficients"), *rows]),
        "",
        *_totals(planned, name),
        f"most entries held at once: {peak_entries(planned, len(experts)):,}",
    ]
    return "\n".join(lines)


def _gets(parameter: PlannedParameter, method: str) -> str:
    if parameter.tied_to is not None:
        return f"tied to {parameter.tied_to}"
    return WORDS.get(parameter.treatment, method)


def _coefficients(parameter: PlannedParameter) -> str:
    values = [f"{value:g}" for value in parameter.coefficients]
    if parameter.tied_to is not None or not values:
        return ""
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def _totals(planned: Sequence[PlannedParameter], method: str) -> list[str]:
    rows = [("total", "parameters", "entries")]
    for treatment in dict.fromkeys(p.treatment for p in planned):
        chosen = [p for p in planned if p.treatment == treatment and p.tied_to is None]
        size = sum(p.size for p in chosen)
        rows.append((WORDS.get(treatment, method), f"{len(chosen):,}", f"{size:,}"))
    if tied := [p for p in planned if p.tied_to is not None]:
        rows.append(("tied", f"{len(tied):,}", ""))
    every = [p for p in planned if p.tied_to is None]
    rows.append(("all", f"{len(every):,}", f"{sum(p.size for p in every):,}"))
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
