"""What all pictures share: colours that colour-blind readers can tell apart, sizes, units."""

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_merge.pareto.sweep_result import SweepResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette
BLUE, ORANGE, GREEN, RED, SKY, PURPLE = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7",
)  # fmt: skip
INK, MUTED, FAINT = "#222222", "#666666", "#C8C8C8"
WEIGHTS = "cividis"
"""Colour map of weights and of values: even for colour-blind readers and in grey."""

DPI = 150
TEXT, SMALL = 10.0, 8.5

MARKERS: dict[str, dict[str, Any]] = {
    "expert": {"marker": "*", "color": GREEN, "markersize": 15, "markeredgecolor": "white"},
    "corrected, equal preference": {
        "marker": "D", "color": RED, "markersize": 7.5, "markeredgecolor": "white",
    },
    "uncorrected merge": {
        "marker": "s", "color": PURPLE, "markersize": 7.5, "markeredgecolor": "white",
    },
    "base, experts' heads": {
        "marker": "X", "color": MUTED, "markersize": 8, "markeredgecolor": "white",
    },
}  # fmt: skip
"""How the points that every sweep is compared with are drawn, everywhere alike."""


def new_figure(width: float, height: float) -> "Figure":
    """An empty picture in inches, white, independent of pyplot and of the user's settings."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white", dpi=DPI)


def tidy(axes: "Axes") -> None:
    """A quiet frame and grid."""
    axes.set_facecolor("white")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(labelsize=SMALL, color=MUTED, labelcolor=INK)
    axes.grid(visible=True, color="#EBEBEB", linewidth=0.8)
    axes.set_axisbelow(True)


def columns_for(count: int, widest: int = 4) -> int:
    """Panels side by side so that the rows are nearly even: 8 gives 4, 3 gives 3, 20 gives 5."""
    if count <= widest:
        return count
    return min(range(3, widest + 2), key=lambda columns: (-count % columns, -columns))


def shorten(name: str, longest: int = 18) -> str:
    """A long name with its middle left out, so that labels do not run into each other."""
    if len(name) <= longest:
        return name
    tail = (longest - 1) // 2
    return f"{name[: longest - 1 - tail]}…{name[-tail:]}"


def percent(result: SweepResult, raw: Tensor) -> Tensor:
    """Metrics in percent of the experts': more is better in either direction."""
    return 100 * result.normalize(raw)


def value_limits(values: list[Tensor], *, goal: float = 100.0) -> tuple[float, float]:
    """An axis that holds the values and the experts' 100 with some air, on round numbers."""
    low = min([goal, *(float(v.min()) for v in values if v.numel())])
    high = max([goal, *(float(v.max()) for v in values if v.numel())])
    air = 0.05 * max(high - low, 2.0)
    return float(math.floor(low - 1.6 * air)), high + air


def describe(result: SweepResult) -> str:
    """Label of an axis of normalized values."""
    lower = "" if result.higher_is_better else " (lower is better)"
    return f"{result.metric}{lower}, % of the expert's"
