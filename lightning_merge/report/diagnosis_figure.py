"""The picture of a diagnosis: where the residual energy of every layer goes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_merge.diagnosing import Diagnosis
from lightning_merge.files import replacing
from lightning_merge.methods.layer_diagnosis import LayerDiagnosis
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


SHOWN = 80
"""Layers that are drawn at most: those with most residual energy, in the order they run."""


def write_diagnosis_picture(diagnosis: Diagnosis, folder: str | Path) -> Path:
    """Write ``diagnosis.png`` into a folder; returns its path."""
    path = Path(folder) / "diagnosis.png"
    layers = _shown(diagnosis.layers)
    # Bars are as thick in a picture of three layers as in one of eighty.
    heights = (max(2.0, 0.8 + 0.42 * len(diagnosis.merges)), 0.9 + 0.21 * max(1, len(layers)))
    figure = new_figure(11.0, sum(heights))
    grid = figure.add_gridspec(2, 2, height_ratios=heights, width_ratios=(1.4, 1))
    bars = figure.add_subplot(grid[1, :])
    _draw_networks(figure.add_subplot(grid[0, 0]), diagnosis)
    _draw_layers(bars, layers, diagnosis.layers)
    _draw_legend(figure.add_subplot(grid[0, 1]), bars)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _shown(layers: Sequence[LayerDiagnosis]) -> list[LayerDiagnosis]:
    heaviest = sorted(range(len(layers)), key=lambda k: -layers[k].energy)[:SHOWN]
    return [layers[k] for k in sorted(heaviest)]


def _draw_layers(
    axes: "Axes", layers: Sequence[LayerDiagnosis], every: Sequence[LayerDiagnosis]
) -> None:
    tidy(axes)
    _draw_parts(axes, layers)
    _draw_marks(axes, layers)
    prefix = _common([layer.name for layer in layers])
    places = range(len(layers))
    axes.set_yticks(places, [shorten(layer.name.removeprefix(prefix), 44) for layer in layers])
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.tick_params(axis="x", top=len(layers) > 30, labeltop=len(layers) > 30)
    energy = sum(layer.energy for layer in every)
    for place, layer in zip(places, layers, strict=True):
        axes.text(1.008, place, _percent(layer.energy, energy), va="center", fontsize=SMALL)
    title = (
        "What an update of each layer can capture, in the order they run; right: weight in means"
    )
    if len(every) > len(layers):
        title += f"\nthe {len(layers)} of {len(every)} layers with most weight; all: layers.csv"
    if prefix:
        title += f"\nnames without their beginning '{shorten(prefix, 60)}'"
    axes.set_title(title, fontsize=TEXT, loc="left")
    label = "share of the layer's residual energy (marks at 0: the base or worse)"
    axes.set_xlabel(label, fontsize=TEXT, color=INK)


def _percent(part: float, whole: float) -> str:
    share = part / whole if whole > 0 else 0.0
    return f"{share:.0%}" if share >= 0.005 else "<1%"


def _draw_parts(axes: "Axes", layers: Sequence[LayerDiagnosis]) -> None:
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


def _draw_marks(axes: "Axes", layers: Sequence[LayerDiagnosis]) -> None:
    places = list(range(len(layers)))
    held = [layer.held_out["full"] for layer in layers]
    axes.plot(held, places, "|", color=INK, markersize=9, mew=1.8, label="any update, held out")
    names = list(next((layer.heuristics for layer in layers), {}))[:3]
    for name, color, marker in zip(names, (RED, INK, MUTED), "oDs", strict=False):
        shown = [min(1.0, max(0.0, layer.heuristics[name])) for layer in layers]
        axes.plot(
            shown, places, marker, color=color, mec="white", ms=5.5, label=name, clip_on=False
        )


def _common(names: Sequence[str]) -> str:
    """The modules that all names begin with, with their dot."""
    parts = [name.split(".")[:-1] for name in names]
    same = 0
    while all(len(p) > same and p[same] == parts[0][same] for p in parts) and len(parts) > 1:
        same += 1
    return "".join(f"{part}." for part in parts[0][:same]) if parts else ""


def _draw_legend(axes: "Axes", of: "Axes") -> None:
    """Bars from the coarsest basis to the finest, then marks; above a picture of any length."""
    axes.set_axis_off()
    handles, labels = of.get_legend_handles_labels()
    pairs = sorted(
        zip(handles, labels, strict=True), key=lambda pair: hasattr(pair[0], "get_ydata")
    )
    axes.legend(
        [handle for handle, _ in pairs],
        [shorten(label, 48) for _, label in pairs],
        title="Captured in each layer",
        alignment="left",
        title_fontsize=TEXT,
        fontsize=SMALL,
        frameon=False,
        loc="upper left",
    )


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
    axes.set_yticks(places, [shorten(name, 40) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_xlabel("error behind the heads, held out (0: the expert)", fontsize=TEXT, color=INK)
    axes.set_title("Whole networks", fontsize=TEXT, loc="left")
    axes.legend(
        fontsize=SMALL,
        frameon=False,
        ncols=2,
        loc="lower right",
        bbox_to_anchor=(1, 0.98),
        borderaxespad=0.2,
    )
