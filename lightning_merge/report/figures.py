"""The pictures of a sweep beside the fronts: responses to the own weight, and ternary maps."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_merge.pareto.sweep_result import SweepResult
from lightning_merge.report.front_figure import front_figure
from lightning_merge.report.pictures import (
    BLUE,
    GREEN,
    INK,
    MARKERS,
    MUTED,
    ORANGE,
    PURPLE,
    SMALL,
    TEXT,
    WEIGHTS,
    columns_for,
    describe,
    new_figure,
    percent,
    shorten,
    tidy,
    value_limits,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure

__all__ = ["front_figure", "response_figure", "ternary_figure"]


def response_figure(result: SweepResult) -> "Figure":
    """Each task's normalized metric against its own weight, one panel a task, one scale for all.

    The line is the path on which the task's weight rises and the others share the rest equally;
    a sweep without it shows all its preferences as points.
    """
    count = len(result.tasks)
    columns = columns_for(count)
    rows = -(-count // columns)
    figure = new_figure(max(3.1 * columns + 0.6, 6.4), 2.5 * rows + 1.3)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    limits = _response_limits(result)
    for index, axes in enumerate(grid.flat):
        if index < count:
            _draw_response(axes, result, index, limits)
            # with a ragged last row the panel above the gap carries the numbers
            axes.tick_params(labelbottom=index + columns >= count)
        else:
            axes.set_axis_off()
    figure.suptitle(
        f"Response of each task to its own weight (0 to 1; the others share the rest equally): "
        f"{describe(result)}"
        if count > 2
        else f"Response of each task to its own weight: {describe(result)}",
        fontsize=TEXT + 1, color=INK, ha="left", x=0.02,
    )  # fmt: skip
    _draw_response_legend(figure)
    return figure


def _response_rows(result: SweepResult, task: int) -> Tensor:
    """The rows of the task's response path by rising weight; none if it was not swept."""
    name = result.tasks[task]
    rows = [
        row
        for row, (kind, favoured) in enumerate(zip(result.kinds, result.favoured, strict=True))
        if kind == "response" and favoured == name
    ]
    order = torch.tensor(rows, dtype=torch.long)
    return order[torch.argsort(result.preferences[order, task], stable=True)]


def _response_limits(result: SweepResult) -> tuple[float, float]:
    values = percent(result, result.raw)
    paths = [_response_rows(result, task) for task in range(len(result.tasks))]
    drawn = [values[rows].flatten() if len(rows) else values.flatten() for rows in paths]
    drawn.append(percent(result, result.references["uncorrected"]))
    return value_limits([v[torch.isfinite(v)] for v in drawn])


def _draw_response(
    axes: "Axes", result: SweepResult, task: int, limits: tuple[float, float]
) -> None:
    tidy(axes)
    values, rows = percent(result, result.raw), _response_rows(result, task)
    references = {
        name: float(percent(result, row)[task]) for name, row in result.references.items()
    }
    axes.axhline(100, color=GREEN, linewidth=1.4)
    axes.axhline(references["uncorrected"], color=PURPLE, linewidth=1.4, linestyle="--")
    base = references["base"]
    if limits[0] <= base <= limits[1]:
        axes.axhline(base, color=MUTED, linewidth=1.4, linestyle=":")
    elif base == base:
        axes.text(0.5, 0.03, f"base at {base:.0f}", transform=axes.transAxes, ha="center",
                  fontsize=SMALL - 0.5, color=MUTED)  # fmt: skip
    if len(rows):
        weight = result.preferences[rows, task].numpy()
        others = [i for i in range(len(result.tasks)) if i != task]
        if others:
            mean = values[rows][:, others].mean(dim=1)
            axes.plot(weight, mean.numpy(), color=ORANGE, linewidth=1.4, marker=".", markersize=4)
        axes.plot(
            weight, values[rows, task].numpy(), color=BLUE, linewidth=1.8, marker="o", markersize=4
        )
    else:
        axes.plot(
            result.preferences[:, task].numpy(),
            values[:, task].numpy(),
            ".",
            color=BLUE,
            markersize=4,
        )
    rows_by_name = result.rows()
    if "equal" in rows_by_name:
        axes.plot([1 / len(result.tasks)], [float(percent(result, rows_by_name["equal"])[task])],
                  linestyle="none", **MARKERS["corrected, equal preference"])  # fmt: skip
    axes.set_title(shorten(result.tasks[task], 24), fontsize=TEXT, color=INK, loc="left")
    axes.set_xlim(-0.03, 1.03)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    axes.set_ylim(*limits)


def _draw_response_legend(figure: "Figure") -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=BLUE, marker="o", markersize=4, label="this task, corrected"),
        Line2D([], [], color=ORANGE, marker=".", label="mean of the other tasks"),
        Line2D([], [], color=GREEN, label="expert"),
        Line2D([], [], color=PURPLE, linestyle="--", label="uncorrected merge"),
        Line2D([], [], color=MUTED, linestyle=":", label="base, experts' heads"),
        Line2D([], [], linestyle="none", label="equal preference",
               **MARKERS["corrected, equal preference"]),
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="outside lower center", ncols=6 if len(figure.axes) > 2 else 3,
        fontsize=SMALL, frameon=False,
    )  # fmt: skip


def ternary_figure(result: SweepResult) -> "Figure":
    """Three tasks: their mean and each of them over the triangle of preferences, on one scale.

    Raises:
        ValueError: If the sweep has not exactly three tasks.
    """
    if len(result.tasks) != 3:
        raise ValueError(f"a ternary picture needs exactly 3 tasks, found {len(result.tasks)}.")
    values = percent(result, result.raw)
    panels = [("mean of the three", values.mean(dim=1))]
    panels += [(task, values[:, i]) for i, task in enumerate(result.tasks)]
    low, high = float(values.nan_to_num(100).min()), float(values.nan_to_num(100).max())
    figure = new_figure(9.4, 7.6)
    grid = figure.subplots(2, 2)
    for axes, (name, value) in zip(grid.flat, panels, strict=True):
        image = _draw_triangle(axes, result, value, (low, max(high, low + 1e-3)))
        axes.set_title(shorten(name, 30), fontsize=TEXT + 1, color=INK)
    bar = figure.colorbar(image, ax=grid, shrink=0.6, pad=0.03)
    bar.set_label(describe(result), fontsize=TEXT, color=INK)
    bar.ax.tick_params(labelsize=SMALL)
    bar.outline.set_visible(False)
    figure.suptitle("Over all preferences; a corner weighs one task alone, the star is the best",
                    fontsize=TEXT + 1, color=INK, ha="left", x=0.02)  # fmt: skip
    return figure


def _draw_triangle(
    axes: "Axes", result: SweepResult, value: Tensor, limits: tuple[float, float]
) -> "PathCollection":
    """Corners: first task lower left, second lower right, third on top."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]], dtype=torch.float64)
    x, y = (result.preferences @ corners).T.numpy()
    style: dict[str, Any] = {"cmap": WEIGHTS, "vmin": limits[0], "vmax": limits[1]}
    if bool(torch.isfinite(value).all()) and _spans_triangle(result.preferences):
        axes.tripcolor(x, y, value.numpy(), shading="gouraud", **style)
    image = axes.scatter(x, y, c=value.numpy(), s=26, edgecolors="white", linewidths=0.5, **style)
    axes.plot(*corners[[0, 1, 2, 0]].T.numpy(), color=MUTED, linewidth=1, zorder=0)
    best = int(value.nan_to_num(-1e9).argmax())
    axes.plot([x[best]], [y[best]], marker="*", color=ORANGE, markersize=18, markeredgecolor=INK)
    names = [shorten(task, 16) for task in result.tasks]
    axes.text(0, -0.05, names[0], ha="center", va="top", fontsize=TEXT, color=INK)
    axes.text(1, -0.05, names[1], ha="center", va="top", fontsize=TEXT, color=INK)
    axes.text(0.5, 0.9, names[2], ha="center", va="bottom", fontsize=TEXT, color=INK)
    axes.set_aspect("equal")
    axes.set_xlim(-0.15, 1.15)
    axes.set_ylim(-0.12, 1.0)
    axes.set_axis_off()
    return image


def _spans_triangle(preferences: Tensor) -> bool:
    different = torch.unique(preferences, dim=0)
    return len(different) >= 4 and int(torch.linalg.matrix_rank(different)) == 3
