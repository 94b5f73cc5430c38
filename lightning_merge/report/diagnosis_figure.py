"""The picture of a diagnosis: where the residual energy of every layer goes."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_merge.diagnosing import Diagnosis
from lightning_merge.files import replacing
from lightning_merge.report.pictures import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    RED,
    SKY,
    SMALL,
    TEXT,
    new_figure,
    shorten,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = (
    ("by one coefficient a task, shared by all layers", SKY, "task_global"),
    ("more by one a task and layer", BLUE, "task"),
    ("more by one a task and output", GREEN, "row"),
    ("more by any update", ORANGE, "full"),
)
"""Nested bases: each holds the one before it."""


def write_diagnosis_picture(diagnosis: Diagnosis, folder: str | Path) -> Path:
    """Write ``diagnosis.png`` into a folder; returns its path."""
    path = Path(folder) / "diagnosis.png"
    rows = len(diagnosis.layers)
    figure = new_figure(11.0, max(4.2, 1.9 + 0.2 * rows))
    bars, errors = figure.subplots(1, 2, width_ratios=(2.7, 1))
    _draw_layers(bars, diagnosis)
    _draw_networks(errors, diagnosis)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _draw_layers(axes: "Axes", diagnosis: Diagnosis) -> None:
    tidy(axes)
    layers = diagnosis.layers
    places = list(range(len(layers)))
    reached = [0.0] * len(layers)
    for label, color, basis in PARTS:
        values = [
            max(layer.in_sample[basis], low) for layer, low in zip(layers, reached, strict=True)
        ]
        widths = [high - low for high, low in zip(values, reached, strict=True)]
        axes.barh(places, widths, left=reached, color=color, label=label, height=0.78)
        reached = values
    rest = [1 - low for low in reached]
    axes.barh(places, rest, left=reached, color=FAINT, label="by none: conflict", height=0.78)
    held = [layer.held_out["full"] for layer in layers]
    axes.plot(held, places, "|", color=INK, markersize=9, mew=1.8, label="any update, held out")
    for (name, color), marker in zip(
        zip(_heuristics(diagnosis), (RED, INK, MUTED), strict=False), "oDs", strict=False
    ):
        shown = [min(1.0, max(0.0, layer.heuristics[name])) for layer in layers]
        axes.plot(shown, places, marker, color=color, mec="white", ms=5, label=name, clip_on=False)
    axes.set_yticks(places, [shorten(layer.name, 34) for layer in layers])
    axes.tick_params(axis="y", labelsize=SMALL - (1.5 if len(layers) > 40 else 0))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    label = "share of the layer's residual energy (marks at 0: the base or worse)"
    axes.set_xlabel(label, fontsize=TEXT, color=INK)
    axes.set_title("What an update of each layer can capture", fontsize=TEXT, loc="left")
    axes.legend(
        fontsize=SMALL,
        frameon=False,
        ncols=2,
        loc="upper left",
        bbox_to_anchor=(0, -0.45 / _inches(axes)),
    )


def _inches(axes: "Axes") -> float:
    return max(1.0, axes.get_figure().get_size_inches()[1] - 1.2)  # type: ignore[union-attr]


def _heuristics(diagnosis: Diagnosis) -> list[str]:
    return list(next((layer.heuristics for layer in diagnosis.layers), {}))[:3]


def _draw_networks(axes: "Axes", diagnosis: Diagnosis) -> None:
    tidy(axes)
    names = list(diagnosis.merges)
    places = list(range(len(names)))
    for offset, color, label, field in (
        (-0.2, MUTED, "as it is", "uncorrected"),
        (0.2, GREEN, "each task corrected", "corrected"),
    ):
        values = [getattr(diagnosis.merges[name], field) for name in names]
        bars = axes.barh([p + offset for p in places], values, 0.38, color=color, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=SMALL, padding=2, color=INK)
    axes.set_yticks(places, [shorten(name, 24) for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlabel("error, held out", fontsize=TEXT, color=INK)
    axes.set_title("Whole networks", fontsize=TEXT, loc="left")
    below = (0, -0.45 / _inches(axes))
    axes.legend(fontsize=SMALL, frameon=False, loc="upper left", bbox_to_anchor=below)
