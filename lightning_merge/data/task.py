"""What a task has to offer: labelled splits to learn from, unlabeled inputs to calibrate with."""

from abc import ABC, abstractmethod
from typing import Any

from torch.utils.data import Dataset
from torchmetrics import Metric


class Task(ABC):
    """One task of a suite: the data of one expert.

    Items of :meth:`train`, :meth:`validation` and :meth:`test` are ``(input, label)``; items of
    :meth:`calibration` are inputs alone, and making them never reads a label. The constructor only
    stores its arguments; data is read when a split is asked for. A plain class on purpose:
    LightningCLI would record the hyper-parameters of the suite for a data module nested in it.
    """

    @property
    @abstractmethod
    def num_classes(self) -> int | None:
        """Number of classes, which is the size of the expert's head; None where there is none."""

    def metric(self) -> Metric | None:
        """What a sweep reports, of (outputs, targets); None, the default, is the accuracy."""
        return None

    def prepare(self) -> None:  # noqa: B027 - most tasks have nothing to do
        """Download or build what the splits need on disk; called once a node, on its rank zero."""

    @abstractmethod
    def train(self) -> Dataset[Any]:
        """Labelled items to fine-tune the expert."""

    @abstractmethod
    def validation(self) -> Dataset[Any]:
        """Labelled items to choose a checkpoint."""

    @abstractmethod
    def test(self) -> Dataset[Any]:
        """Labelled items that every report is measured on."""

    @abstractmethod
    def calibration(self) -> Dataset[Any]:
        """Unlabeled inputs for statistics of features."""
