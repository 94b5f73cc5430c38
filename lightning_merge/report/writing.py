"""Writes the pictures and the page of a sweep."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_merge.files import replacing
from lightning_merge.methods.adaptation.coefficients import (
    MANIFEST,
    TENSORS,
    LearnedCoefficients,
)
from lightning_merge.pareto.sweep_result import SweepResult
from lightning_merge.report.coefficients_figure import coefficients_figure
from lightning_merge.report.figures import front_figure, response_figure, ternary_figure
from lightning_merge.report.html import render_html
from lightning_merge.report.interference_figure import interference_figure
from lightning_merge.report.live import LiveModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(
    result: SweepResult, folder: str | Path, live: LiveModel | None = None
) -> list[Path]:
    """Write ``front.png``, ``response.png``, for three tasks ``ternary.png``, and ``report.html``.

    Each file takes the place of an older one in one step, the page last.

    Args:
        result: The sweep.
        folder: Made if it is missing.
        live: What the page's sliders need to evaluate any preference exactly, from
            :func:`.live.build_live`; without it they show the nearest evaluated preference.

    Returns:
        The paths written, in that order.

    Raises:
        OSError: If the folder cannot be written to.
        ValueError: If ``live`` is of other tasks than the sweep.
    """
    pictures = {"front.png": front_figure(result)}
    if len(result.tasks) == 3:
        pictures["ternary.png"] = ternary_figure(result)
    pictures["response.png"] = response_figure(result)
    images = {name: png(figure) for name, figure in pictures.items()}
    page = render_html(result, images, live)
    files = {**images, "report.html": page.encode("utf-8")}
    paths = []
    for name, content in files.items():
        path = Path(folder) / name
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        paths.append(path)
    return paths


def merge_pictures(
    report: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, bytes]:
    """What is put beside a merged model.

    ``interference.png``, where the merge was measured, and ``coefficients.png``, where some were
    learned.

    Args:
        report: ``MergedModel.report``.
        files: ``MergedModel.files``.
    """
    pictures = {}
    if "layers" in report:
        pictures["interference.png"] = png(interference_figure(report))
    if files and MANIFEST in files:
        learned = LearnedCoefficients.of(files[MANIFEST], files[TENSORS])
        pictures["coefficients.png"] = png(coefficients_figure(learned))
    return pictures


def png(figure: "Figure") -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    # no version in the file: the same sweep gives the same bytes
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
