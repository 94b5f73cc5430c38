"""The self-contained page of a sweep: opens offline, its sliders show evaluated numbers only."""

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from lightning_merge.pareto.sweep_result import SweepResult
from lightning_merge.report.live import MAX_BYTES, LiveModel
from lightning_merge.report.table import (
    ROW_LABELS,
    WIDEST_AS_COLUMNS,
    is_fraction,
    show,
    table_cells,
    unit,
)

CAPTIONS = {
    "front.png": "What two tasks cost each other: values at the preferences that weigh only them.",
    "ternary.png": "Values over all preferences of the three tasks.",
    "response.png": "Each task's value as its own weight rises; the others share the rest equally.",
}

_CARDS = {
    "experts": "one model a task",
    "base": "before fine-tuning",
    "uncorrected": "one model, no correction",
    "equal": "one model, all tasks alike",
    "priority": "each task favoured in turn",
    "one_hot": "each task alone in turn",
    "per_task": "each head with its own map",
}

_MEASURES = {
    "kendall_tau": (
        "Kendall's τ",
        "rank agreement of a task's weight with its value; 1 is perfect",
    ),
    "monotonicity_violations": (
        "steps that go wrong",
        "share of the steps between two tasks on which the one that gains weight loses value",
    ),
    "control_range": ("control range", "what a task gains from its worst to its own preference"),
    "cross_cost": ("cross-cost", "what the others lose when one task alone counts"),
}


def render_html(
    result: SweepResult, pictures: Mapping[str, bytes], live: LiveModel | None = None
) -> str:
    """The page as text.

    Args:
        result: The sweep.
        pictures: PNG files by name, embedded in this order.
        live: Statistics and samples for exact sliders. Left out, and said so on the page, where it
            is over the size limit or the metric is no accuracy; the sliders then show the nearest
            evaluated preference.

    Raises:
        ValueError: If ``live`` is of other tasks than the sweep.
    """
    embedded, note = _usable(result, live)
    environment = Environment(
        loader=PackageLoader("lightning_merge", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        title=f"One model from {len(result.tasks)} experts",
        method=result.method,
        facts=f"{len(result.kinds)} preferences evaluated, metric: {result.metric}"
        + ("" if result.higher_is_better else " (lower is better)"),
        tasks=result.tasks,
        metric=result.metric,
        unit=unit(result),
        cards=_cards(result),
        warnings=result.warnings(),
        highlighted=ROW_LABELS["equal"],
        blocks=_blocks(result),
        pictures=[
            {"data": base64.b64encode(png).decode("ascii"), "caption": CAPTIONS.get(name, name)}
            for name, png in pictures.items()
        ],
        measures=_measures(result),
        diagnostics=_diagnostics(result),
        plain_tables=[
            ("Time", [(name, f"{seconds:.1f} s") for name, seconds in result.timings.items()]),
            ("Versions", list(result.versions.items())),
        ],
        data=_data(result, embedded),
        live={"header": embedded.header(), "text": embedded.encode()} if embedded else None,
        live_note=note,
    )


def _usable(result: SweepResult, live: LiveModel | None) -> tuple[LiveModel | None, str]:
    if live is None:
        return None, ""
    if live.tasks != result.tasks:
        raise ValueError(
            f"the live model has the tasks {list(live.tasks)}, the sweep {list(result.tasks)}: "
            "build it from the same tasks in the same order."
        )
    if "accuracy" not in result.metric.lower() or not is_fraction(result):
        return None, f"Sliders evaluate accuracies live; this sweep measured {result.metric}."
    if live.num_bytes > MAX_BYTES:
        return None, (
            f"Live evaluation was left out: it needs {live.num_bytes / 1e6:.1f} MB in this page, "
            f"the limit is {MAX_BYTES / 1e6:.0f} MB."
        )
    return live, ""


def _cards(result: SweepResult) -> list[dict[str, Any]]:
    percent = is_fraction(result)
    cards = []
    for name, row in result.rows().items():
        share = show(float(result.normalize(row).mean()), percent=True)
        note = _CARDS[name] if name == "experts" else f"{share} % of the experts; {_CARDS[name]}"
        value = show(float(row.mean()), percent) + (" %" if percent else "")
        cards.append(
            {"name": ROW_LABELS[name], "value": value, "note": note, "main": name == "equal"}
        )
    return cards


def _blocks(result: SweepResult) -> list[dict[str, Any]]:
    head, blocks = table_cells(result)
    if len(result.tasks) > WIDEST_AS_COLUMNS:
        head = ["task", *head[1:]]
    return [
        {"unit": key, "head": head, "lines": lines}
        for key, lines in zip(("raw", "normalized"), blocks.values(), strict=True)
    ]


def _measures(result: SweepResult) -> list[dict[str, str]]:
    summary = result.summary()
    lines = []
    for key, name in (("raw", "hypervolume"), ("normalized", "hypervolume, normalized")):
        volume = summary["hypervolume"][key]
        if volume is not None:
            error = "" if volume["method"] == "exact" else f" ± {volume['error']:.2g}"
            points = sorted({f"{x:.4g}" for x in volume["reference_point"]})
            note = f"volume that the sweep dominates, {volume['method']}, reference point "
            note += points[0] if len(points) == 1 else "the base's values"
            lines.append({"name": name, "value": f"{volume['value']:.4f}{error}", "note": note})
    lines.append(
        {
            "name": "uniformity",
            "value": _number(summary["uniformity"]),
            "note": "1 where weighted losses are equal; over preferences that weigh every task",
        }
    )
    for key, (name, note) in _MEASURES.items():
        found = (summary["alignment"] or {}).get(key)
        value = found["mean"] if isinstance(found, dict) else found
        lines.append({"name": name, "value": _number(value), "note": note})
    return lines


def _diagnostics(result: SweepResult) -> dict[str, Any]:
    """One line a fact, one column a task: facts are many and their names long."""
    columns = {task: dict(_flat(facts)) for task, facts in result.diagnostics.items()}
    names = dict.fromkeys(name for facts in columns.values() for name in facts)
    lines = [[name, *(_number(facts.get(name)) for facts in columns.values())] for name in names]
    return {"head": ["", *columns], "lines": lines}


def _flat(facts: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Facts by readable name, those of nested tables as well; lists, such as curves, are not."""
    for name, value in facts.items():
        readable = name.replace("_", " ")
        if isinstance(value, Mapping):
            yield from ((f"{readable}, {inner}", x) for inner, x in _flat(value))
        elif not isinstance(value, (list, tuple)):
            yield readable, value


def _data(result: SweepResult, live: LiveModel | None) -> dict[str, Any]:
    """What the sliders read; six digits are more than any test set resolves."""
    normalized = result.normalized.nan_to_num(0)
    return {
        "tasks": result.tasks,
        "fraction": is_fraction(result),
        "higher": result.higher_is_better,
        "preferences": _rounded(result.preferences),
        "raw": _rounded(result.raw),
        "rows": {name: _rounded(row) for name, row in result.rows().items()},
        "largest": max(float(v.max()) for v in (result.raw, *result.references.values())),
        "largest_normalized": float(normalized.max()),
        "samples": [len(labels) for labels in live.labels] if live else [],
        "available": live.available if live else [],
    }


def _rounded(values: Tensor) -> list[Any]:
    return json.loads(json.dumps(values.tolist()), parse_float=lambda text: round(float(text), 6))


def _number(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "-" if value != value else f"{value:.4g}"
    return str(value)
