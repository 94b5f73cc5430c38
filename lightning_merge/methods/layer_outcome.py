"""What a method that solves layers on their inputs found, as plain data."""

from collections.abc import Collection, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from torch import Tensor

from lightning_merge.layers.sites import Kind, may_be_site
from lightning_merge.methods.average import Average
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.layer_solution import LayerReport
from lightning_merge.methods.layerwise import LayerWalk
from lightning_merge.methods.outcome import Outcome, PlannedTreatment, as_plain
from lightning_merge.states import STATISTIC_SUFFIXES, StateDict, kind_of

LAYERS = "layers.json"
MOST_NAMES = 12
"""Modules of each reason that a manifest names; the file beside it names all."""


def layer_outcome(
    state: dict[str, Tensor], walk: LayerWalk, reports: Sequence[LayerReport]
) -> Outcome:
    """The outcome of a walk through the layers.

    Args:
        state: The merged weights.
        walk: The walk, which knows what it left to the fallback and why.
        reports: What happened to each layer.
    """
    left = {name or "the network itself": why for name, why in walk.found.left.items()}
    rows = [as_plain(asdict(report)) for report in reports]
    return Outcome(
        state=state,
        found={**_summary(reports), "left": _by_reason(left), "details": LAYERS},
        files={LAYERS: {"layers": rows, "left": left}},
        treatments=_treatments(walk, reports),
    )


def fallback_treatment(fallback: WeightMethod, name: str, kind: str) -> PlannedTreatment:
    """What the fallback of a walk gives an entry, in the words of a plan."""
    found = fallback.treatment(name, kind)
    if found == "method":
        return "average" if isinstance(fallback, Average) else "fallback"
    return found


def known_of_layer(
    fallback: WeightMethod,
    kinds: Collection[Kind],
    name: str,
    shape: tuple[int, ...],
    kind: str,
    *,
    bias: bool,
    renormalised: bool,
) -> PlannedTreatment:
    """What an entry gets as far as that is known without a pass.

    Args:
        fallback: Merges what no layer covers.
        kinds: Kinds of layers that are solved.
        name: The entry.
        shape: Its shape.
        kind: ``"floating"`` or ``"integer"``.
        bias: Whether biases are solved with their weights.
        renormalised: Whether batch norms get the statistics of what reaches them.
    """
    if kind == "floating":
        statistic = name.rpartition(".")[2] in STATISTIC_SUFFIXES
        if renormalised if statistic else may_be_site(name, shape, kinds, bias=bias):
            return "unknown"
    return fallback_treatment(fallback, name, kind)


def _summary(reports: Sequence[LayerReport]) -> dict[str, Any]:
    kept: dict[str, int] = {}
    for report in reports:
        kept[report.kept] = kept.get(report.kept, 0) + 1

    def middle(values: list[float]) -> float | None:
        known = [value for value in values if value == value]
        return as_plain(median(known)) if known else None

    return {
        "layers": kept,
        "median_captured": middle([report.captured for report in reports]),
        "median_held_out": middle([report.held_out for report in reports]),
    }


def _by_reason(left: dict[str, str]) -> dict[str, Any]:
    reasons: dict[str, list[str]] = {}
    for name, why in left.items():
        reasons.setdefault(why, []).append(name)
    return {
        why: {"modules": len(names), "names": names[:MOST_NAMES]} for why, names in reasons.items()
    }


def _treatments(walk: LayerWalk, reports: Sequence[LayerReport]) -> dict[str, PlannedTreatment]:
    kept = {report.name: report.kept for report in reports}
    solved: set[str] = set()
    found: dict[str, PlannedTreatment] = {}
    for site in walk.sites:
        names = (*site.weights, *(site.biases if walk.options.bias else ()))
        if kept[site.name] == "base":
            found.update(dict.fromkeys(names, "base"))
        if kept[site.name] != "fallback":  # a heuristic of the method is the method's choice
            solved.update(names)
    solved |= walk.renormalised
    base: StateDict = walk.base
    for name in base:
        if name not in solved:
            found[name] = fallback_treatment(walk.fallback, name, kind_of(base, name))
    return found
