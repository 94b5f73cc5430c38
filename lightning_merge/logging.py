"""What a sweep found, into whatever loggers the Trainer has: figures, table and pictures.

A logger takes what it can: every one gets the figures; one with ``log_image`` and ``log_table``
(Weights & Biases) pictures and table; TensorBoard both as images and text; a logger with a folder
of its own, such as the CSV logger, the files beside its metrics.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_merge.pareto import SweepResult
from lightning_merge.report.table import markdown_table


@runtime_checkable
class PictureLogger(Protocol):
    """A logger that takes pictures by file and tables by frame, as ``WandbLogger`` does."""

    def log_image(self, key: str, images: list[Any]) -> None:
        """Log pictures, each a path, an array or an image."""

    def log_table(self, key: str, *, dataframe: Any) -> None:
        """Log a table."""


def log_sweep(loggers: Iterable[Logger], result: SweepResult, folder: str | Path) -> None:
    """Log a sweep's figures, its table of preferences, and every picture of its folder.

    Args:
        loggers: The Trainer's loggers.
        result: The sweep.
        folder: Where its files are.
    """
    rows = figures(result)
    for logger in loggers:
        for step, row in enumerate(rows):
            logger.log_metrics(row, step=step)
        log_files(logger, result, Path(folder))
        logger.save()
        logger.finalize("success")


def figures(result: SweepResult) -> list[dict[str, float]]:
    """One step a preference: its weights and scores; the named rows with the first."""
    rows = []
    for weights, scores in zip(result.preferences.tolist(), result.raw.tolist(), strict=True):
        row = {f"preference/{t}": p for t, p in zip(result.tasks, weights, strict=True)}
        row |= {f"{result.metric}/{t}": x for t, x in zip(result.tasks, scores, strict=True)}
        rows.append(row | {f"{result.metric}/mean": sum(scores) / len(scores)})
    rows[0] |= named_rows(result)
    return rows


def named_rows(result: SweepResult) -> dict[str, float]:
    """Means of the reference rows, raw and normalized, where they are defined."""
    return {
        f"{row}/{name}": values[name]
        for row, values in result.summary()["rows"].items()
        for name in ("raw_mean", "normalized_mean")
        if values[name] is not None
    }


def log_files(logger: Logger, result: SweepResult, folder: Path) -> None:
    """Hand the table and the pictures to one logger, in the form that it takes."""
    pictures = sorted(folder.glob("*.png"))
    if isinstance(logger, PictureLogger):
        logger.log_table(key="sweep/results", dataframe=result.table())
        for picture in pictures:
            logger.log_image(key=f"sweep/{picture.stem}", images=[str(picture)])
    elif isinstance(logger, TensorBoardLogger):
        _to_tensorboard(logger, result, pictures)
    elif logger.log_dir:
        own = Path(logger.log_dir) / "sweep"
        own.mkdir(parents=True, exist_ok=True)
        for file in (*pictures, folder / "results.csv", folder / "summary.json"):
            shutil.copyfile(file, own / file.name)


def _to_tensorboard(logger: TensorBoardLogger, result: SweepResult, pictures: list[Path]) -> None:
    from matplotlib.image import imread

    board: Any = logger.experiment
    for picture in pictures:
        board.add_image(f"sweep/{picture.stem}", imread(picture)[..., :3], dataformats="HWC")
    board.add_text("sweep/table", markdown_table(result))
    facts = {"method": result.method, "metric": result.metric, "tasks": len(result.tasks)}
    logger.log_hyperparams(facts, named_rows(result))
