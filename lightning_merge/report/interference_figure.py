"""The picture of interference: how the experts get in each other's way, layer by layer."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_merge.report.pictures import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
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
    from matplotlib.figure import Figure

COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, PURPLE, INK, MUTED)
DASHES = ("-", "--", ":", "-.")


def interference_figure(report: Mapping[str, Any]) -> "Figure":
    """Norms, cosines, sign conflicts and singular task interference over the depth of the model.

    Args:
        report: The section ``merge`` of ``merged.json``: ``MergedModel.report``, or
            ``MergeReport.as_dict()``.

    Raises:
        ValueError: If it holds no layers, as after a merge with ``report="off"``.
    """
    rows: Sequence[Mapping[str, Any]] = report.get("layers", ())
    if not rows:
        raise ValueError(
            "the merge was not measured, so there is nothing to draw: merge with report='full'."
        )
    singular = any("singular_interference" in row for row in rows)
    panels = [_draw_norms, _draw_cosines, _draw_conflicts, *([_draw_singular] * singular)]
    figure = new_figure(max(7.5, 2.5 + 0.26 * len(rows)), 1.9 * len(panels) + 2.2)
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, draw in zip(grid, panels, strict=True):
        tidy(axes)
        draw(axes, rows, report)
    names = [shorten(str(row["layer"]), 28) for row in rows]
    grid[-1].set_xticks(range(len(rows)), names, rotation=90)
    grid[-1].set_xlim(-0.6, len(rows) - 0.4)
    figure.suptitle(
        f"Interference of {len(report['tasks'])} experts, layer by layer",
        fontsize=TEXT + 1, color=INK, ha="left", x=0.02,
    )  # fmt: skip
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize=SMALL,
        frameon=False,
    )  # fmt: skip
    return figure


def _draw_norms(axes: "Axes", rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> None:
    for index, task in enumerate(report["tasks"]):
        values = [100 * row["relative_norms"][index] for row in rows]
        colour = COLOURS[index % len(COLOURS)]
        dash = DASHES[index // len(COLOURS) % len(DASHES)]
        axes.plot(values, dash, color=colour, marker=".", linewidth=1.2, label=shorten(task))
    _titled(axes, "Size of the task vectors, % of the base's norm")
    axes.set_ylim(bottom=0)


def _draw_cosines(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]
) -> None:
    low, mean, high = (
        [row["cosine"][kind] for row in rows] for kind in ("lowest", "mean", "highest")
    )
    axes.axhline(0, color=MUTED, linewidth=0.9)
    axes.fill_between(range(len(rows)), low, high, color=FAINT, alpha=0.6, linewidth=0)
    axes.plot(mean, color=INK, marker=".", linewidth=1.4)
    _titled(axes, "Cosine of pairs of task vectors: mean, and lowest to highest")


def _draw_conflicts(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]
) -> None:
    axes.bar(range(len(rows)), [100 * row["sign_conflict"] for row in rows], color=RED, width=0.7)
    axes.axhline(50, color=MUTED, linewidth=0.9, linestyle=":")
    _titled(
        axes, "Signs of two experts that conflict, % of the entries both change; dotted: chance"
    )
    axes.set_ylim(0, 75)


def _draw_singular(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]
) -> None:
    found = {
        index: row["singular_interference"]
        for index, row in enumerate(rows)
        if "singular_interference" in row
    }
    axes.bar(list(found), list(found.values()), color=PURPLE, width=0.7)
    _titled(axes, "Singular task interference over the sum of singular values (0: no overlap)")
    axes.set_ylim(bottom=0)


def _titled(axes: "Axes", text: str) -> None:
    axes.set_title(text, fontsize=TEXT, color=INK, loc="left")
