"""Heat map of learned coefficients: ``python -m lightning_merge.report.coefficients_figure``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_merge.files import replacing
from lightning_merge.methods.adaptation.coefficients import LearnedCoefficients
from lightning_merge.report.pictures import INK, MUTED, SMALL, TEXT, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LABELS = 40
"""Names of groups that are still legible, one below the other."""
MOST_WRITTEN = 12
"""Up to so many groups, the coefficients stand in their cells."""


def coefficients_figure(learned: LearnedCoefficients) -> "Figure":
    """Coefficients by group and task, and beside them the entropy of each task while they learned.

    Args:
        learned: Coefficients; without a history the second part is left out.
    """
    groups, tasks = learned.values.shape
    entropy = learned.history.get("entropy")
    has_history = entropy is not None and len(entropy) > 1
    height = min(14.0, max(3.2, 1.4 + 0.16 * groups))
    figure = new_figure(3.4 + 0.6 * tasks + 5.4 * has_history, height)
    axes = figure.subplots(
        1, 1 + has_history, squeeze=False, width_ratios=[1, 1.4][: 1 + has_history]
    )[0]
    panel = axes[0]
    # Around zero, so that a colour tells the sign.
    limit = max(float(learned.values.abs().max()), 1e-6)
    image = panel.imshow(
        learned.values.numpy(), aspect="auto", cmap="PuOr_r", vmin=-limit, vmax=limit
    )
    if groups <= MOST_WRITTEN:
        for (row, column), value in np.ndenumerate(learned.values.numpy()):
            dark = abs(value) > 0.6 * limit
            panel.text(
                column, row, f"{value:.3g}", ha="center", va="center", fontsize=SMALL - 1,
                color="white" if dark else INK,
            )  # fmt: skip
    step = -(-groups // MOST_LABELS)
    panel.set_yticks(range(0, groups, step), learned.groups[::step], fontsize=SMALL - 2)
    panel.set_xticks(range(tasks), learned.tasks, fontsize=SMALL, rotation=45, ha="right")
    panel.set_title("coefficient of the task vector", fontsize=TEXT, color=INK, loc="left")
    bar = figure.colorbar(image, ax=panel)
    bar.ax.tick_params(labelsize=SMALL)
    if has_history:
        assert entropy is not None
        lines = axes[1]
        tidy(lines)
        for task, series in zip(learned.tasks, entropy.T, strict=True):
            lines.plot(range(len(series)), series.numpy(), linewidth=1.0, label=task)
        lines.set_xlabel("step", fontsize=SMALL)
        lines.set_title("entropy of the predictions, nats", fontsize=TEXT, color=INK, loc="left")
        lines.legend(
            fontsize=SMALL - 1, frameon=False, labelcolor=MUTED, loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )  # fmt: skip
    return figure


def draw_coefficients(folder: str | Path) -> Path:
    """Draw what ``AdaMerging(save=folder)`` wrote, as ``coefficients.png`` beside it."""
    path = Path(folder) / "coefficients.png"
    figure = coefficients_figure(LearnedCoefficients.load(folder))
    with replacing(path) as temporary:
        figure.savefig(temporary)
    return path


def main(arguments: list[str]) -> int:
    """Draw the coefficients of a folder and print the picture's path."""
    if len(arguments) != 1:
        print("usage: python -m lightning_merge.report.coefficients_figure FOLDER", file=sys.stderr)  # noqa: T201
        return 2
    try:
        print(draw_coefficients(arguments[0]))  # noqa: T201
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
