"""The picture of the pairwise fronts: what two tasks cost each other."""

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_merge.pareto.agreement import edge_rows
from lightning_merge.pareto.fronts import pareto_mask
from lightning_merge.pareto.sweep_result import SweepResult
from lightning_merge.report.pictures import (
    BLUE,
    FAINT,
    INK,
    MARKERS,
    MUTED,
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
    from matplotlib.figure import Figure, FigureBase

ALL_PAIRS_UP_TO = 6
"""More pairs than this are shown as a map of all, beside the most contested ones large."""

_MAP_WIDTH = 4.6

Pair = tuple[int, int]


def front_figure(result: SweepResult) -> "Figure":
    """Pairwise fronts in percent of the experts, with experts, uncorrected merge and base marked.

    Up to four tasks: every pair. More: the six most contested pairs, and a map of all of them.
    Pairs need at least two evaluated points between their corners; without any, the picture shows
    the tasks' values at all preferences.
    """
    edges = front_edges(result)
    ranked = sorted(edges, key=lambda pair: -contest(result, edges[pair]))
    with_map = len(ranked) > ALL_PAIRS_UP_TO
    shown = ranked[:ALL_PAIRS_UP_TO] if with_map else list(edges)
    if not shown:  # no edge was swept: the clouds of points still tell something
        shown = list(itertools.combinations(range(len(result.tasks)), 2))[:ALL_PAIRS_UP_TO]
    if not shown:
        shown = [(0, 0)]

    columns = 3 if with_map else columns_for(len(shown), widest=3)
    rows = -(-len(shown) // columns)
    side = 4.6 if len(shown) == 1 else 3.1
    width = columns * side + (_MAP_WIDTH if with_map else 0) + 0.8
    figure = new_figure(max(width, 6.4), rows * side * 0.96 + 1.1)
    panels: FigureBase = figure
    if with_map:
        halves: Any = figure.subfigures(1, 2, width_ratios=[_MAP_WIDTH, columns * side + 0.8])
        panels = halves[1]
        _draw_map(halves[0].subplots(), result, edges)
    grid = panels.subplots(rows, columns, squeeze=False)
    limits = _limits(result, edges)
    for axes, pair in itertools.zip_longest(grid.flat, shown):
        if pair is None:
            axes.set_axis_off()
        else:
            _draw_pair(axes, result, pair, edges.get(pair), limits)
    title = "Most contested pairs" if with_map else "Pairwise fronts"
    panels.suptitle(f"{title}: {describe(result)}", fontsize=TEXT + 1, color=INK, ha="left", x=0.02)
    _draw_weights(panels, grid)
    _draw_legend(figure)
    return figure


def front_edges(result: SweepResult) -> dict[Pair, Tensor]:
    """Rows of the sweep on each edge that holds a point between its corners, in edge order."""
    edges = {}
    for pair in itertools.combinations(range(len(result.tasks)), 2):
        rows = edge_rows(result.preferences, *pair)
        weights = result.preferences[rows, pair[1]].tolist()
        # a corner may be evaluated for several grids: once is enough
        kept = [row for i, row in enumerate(rows) if i == 0 or weights[i] > weights[i - 1] + 1e-9]
        if len(kept) > 2:
            edges[pair] = torch.stack(kept)
    return edges


def contest(result: SweepResult, edge: Tensor) -> float:
    """What the best compromise of a pair costs: mean shortfall of both from their best, in %.

    0 where an expert of the pair has zero, so that nothing can be normalized.
    """
    both = (result.preferences[edge] > 0).any(dim=0).nonzero().flatten()
    values = percent(result, result.raw)[edge][:, both]
    best = values.amax(dim=0)
    return float((best - values).abs().mean(dim=1).min().nan_to_num(0.0))


def _limits(result: SweepResult, edges: dict[Pair, Tensor]) -> tuple[float, float]:
    """One scale for all panels, so that they compare; the base stays outside where it is far."""
    shown = [percent(result, row) for name, row in result.rows().items() if name != "base"]
    values = percent(result, result.raw)
    shown += [values[edge][:, list(pair)].flatten() for pair, edge in edges.items()] or [
        values.flatten()
    ]
    finite = [v[torch.isfinite(v)] for v in shown]
    return value_limits(finite)


def _draw_pair(
    axes: "Axes",
    result: SweepResult,
    pair: Pair,
    edge: Tensor | None,
    limits: tuple[float, float],
) -> None:
    x, y = pair
    values = percent(result, result.raw).numpy()
    tidy(axes)
    axes.axvline(100, color=FAINT, linewidth=1, zorder=1)
    axes.axhline(100, color=FAINT, linewidth=1, zorder=1)
    axes.plot(values[:, x], values[:, y], ".", color="#DADADA", markersize=4, zorder=1.5)
    if edge is not None and bool(torch.isfinite(result.normalized[edge][:, [x, y]]).all()):
        front = values[edge.numpy()][:, [x, y]]
        best = pareto_mask(torch.from_numpy(front), maximize=True).numpy()
        weight = result.preferences[edge, x].numpy()
        axes.plot(front[:, 0], front[:, 1], color=BLUE, linewidth=1.3, alpha=0.6, zorder=2)
        axes.scatter(
            front[best, 0], front[best, 1], c=weight[best], cmap=WEIGHTS, vmin=0, vmax=1, s=34,
            edgecolors="white", linewidths=0.6, zorder=3,
        )  # fmt: skip
        axes.scatter(
            front[~best, 0], front[~best, 1], s=26, facecolors="white", edgecolors=BLUE, zorder=2.5
        )
    _draw_references(axes, result, pair, limits)
    axes.set_xlim(limits)
    axes.set_ylim(limits)
    axes.set_aspect("equal")
    axes.set_xlabel(shorten(result.tasks[x]), fontsize=TEXT, color=INK)
    axes.set_ylabel(shorten(result.tasks[y]), fontsize=TEXT, color=INK)


def _draw_references(
    axes: "Axes", result: SweepResult, pair: Pair, limits: tuple[float, float]
) -> None:
    rows, pick = result.rows(), list(pair)
    points = {
        "expert": rows["experts"],
        "uncorrected merge": rows["uncorrected"],
        "base, experts' heads": rows["base"],
    }
    if "equal" in rows:
        points["corrected, equal preference"] = rows["equal"]
    for name, row in points.items():
        x, y = percent(result, row)[pick].tolist()
        inside = all(limits[0] <= v <= limits[1] for v in (x, y))
        if inside:
            axes.plot([x], [y], linestyle="none", zorder=4, **MARKERS[name])
        elif x == x and y == y:
            # outside of the frame: said in words, a marker on the edge would be a wrong place
            axes.annotate(
                f"{name.split(',')[0]} at ({x:.0f}, {y:.0f})", (0.02, 0.02),
                xycoords="axes fraction", fontsize=SMALL - 1, color=MUTED, zorder=5,
                bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none"},
            )  # fmt: skip


def _draw_map(axes: "Axes", result: SweepResult, edges: dict[Pair, Tensor]) -> None:
    """The lower triangle of all pairs, coloured by what their best compromise costs."""
    count = len(result.tasks)
    costs = torch.full((count, count), torch.nan, dtype=torch.float64)
    for (x, y), edge in edges.items():
        costs[y, x] = contest(result, edge)
    image = axes.imshow(costs[1:, :-1].numpy(), cmap="cividis_r", vmin=0)
    names = [shorten(task, 14) for task in result.tasks]
    axes.set_xticks(range(count - 1), names[:-1], rotation=90 if count > 9 else 45, ha="right")
    if count > 9:
        axes.set_xticks(range(count - 1), names[:-1], rotation=90, ha="center")
    axes.set_yticks(range(count - 1), names[1:])
    axes.tick_params(labelsize=SMALL, length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(
        "All pairs: shortfall of the best compromise,\nmean of both tasks, in points",
        fontsize=TEXT, color=INK, loc="left",
    )  # fmt: skip
    highest = float(torch.nan_to_num(costs).max())
    if count <= 10:
        for x, y in edges:
            dark = float(costs[y, x]) > 0.55 * highest
            axes.text(
                x, y - 1, f"{float(costs[y, x]):.1f}", ha="center", va="center",
                fontsize=SMALL, color="white" if dark else INK,
            )  # fmt: skip
    else:
        bar = axes.figure.colorbar(image, ax=axes, shrink=0.6)
        bar.ax.tick_params(labelsize=SMALL)


def _draw_weights(panels: "FigureBase", grid: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = panels.colorbar(
        ScalarMappable(Normalize(0, 1), WEIGHTS), ax=grid, shrink=0.7, pad=0.02, aspect=30
    )
    bar.set_label("weight of the task on the horizontal axis", fontsize=SMALL, color=INK)
    bar.ax.tick_params(labelsize=SMALL)
    bar.outline.set_visible(False)


def _draw_legend(figure: "Figure") -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=BLUE, marker="o", markersize=6, label="corrected, two tasks weighted"),
        Line2D([], [], color=BLUE, marker="o", markersize=6, markerfacecolor="white",
               linestyle="none", label="dominated on this edge"),
        Line2D([], [], color="#C0C0C0", marker=".", linestyle="none", label="other preferences"),
        *(Line2D([], [], linestyle="none", label=name, **style) for name, style in MARKERS.items()),
    ]  # fmt: skip
    columns = 4 if figure.get_figwidth() > 8 else 2
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False
    )
