"""Two columns of any Hugging Face data set, inputs and labels, as a task."""

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_merge.data.sources import Kind, load_splits, take
from lightning_merge.data.task import Task


class ColumnTask(Task):
    """Classification of what one column of a Hugging Face data set holds.

    A split that is not named is held out of the training split: ``seed`` shuffles its positions,
    the first ``calibration_size`` of them are calibration, the next ``validation_size`` are
    validation, the rest is trained on. So splits never share a row, and they are the same on
    every machine. Nothing is read before a split is asked for.

    Args:
        path: Name on the Hub, folder of files, parquet file or folder of them, or a folder of
            save_to_disk.
        column: Column of inputs.
        label: Column of labels: class labels, integers from 0, or strings.
        train_split: Split to fine-tune on; slices work everywhere, as in 'train[:80%]'.
        validation_split: Split to choose a checkpoint on. None: held out of the training split.
        test_split: Split to report on.
        calibration_split: Split of unlabeled inputs for statistics; its labels are never read.
            None: held out of the training split.
        validation_size: How much to hold out: a fraction below 1, or a number of rows.
        calibration_size: The same for calibration.
        num_classes: Number of classes. None: from the class names of the label column, or else
            from the labels of the training split.
        kind: What ``path`` is; 'auto' finds out.
        name: Configuration of a data set on the Hub.
        revision: Commit, tag or branch of a data set on the Hub.
        seed: Seed of what is held out.
    """

    _unit: ClassVar[str] = "rows"
    """What the rows are, in messages."""
    _role: ClassVar[str] = "column"
    """The argument that names the column of inputs."""

    def __init__(
        self,
        path: str,
        *,
        column: str,
        label: str = "label",
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str = "test",
        calibration_split: str | None = None,
        validation_size: int | float = 0.1,
        calibration_size: int | float = 0.1,
        num_classes: int | None = None,
        kind: Kind = "auto",
        name: str | None = None,
        revision: str | None = None,
        seed: int = 0,
    ) -> None:
        sizes = {"validation_size": validation_size, "calibration_size": calibration_size}
        wrong = [
            f"{key} {size}" for key, size in sizes.items() if size <= 0 or 1 < size != int(size)
        ]
        if wrong:
            raise ValueError(
                f"expected a fraction in (0, 1) or a number of {self._unit}, "
                f"got {', '.join(wrong)}."
            )
        self.path, self.kind, self.name, self.revision = str(path), kind, name, revision
        self.train_split, self.validation_split = train_split, validation_split
        self.test_split, self.calibration_split = test_split, calibration_split
        self.validation_size, self.calibration_size = validation_size, calibration_size
        self.column, self.label, self.seed = column, label, seed
        self._num_classes = num_classes

    @property
    def num_classes(self) -> int:
        """Number of classes: as given, or else as the data says."""
        return self._num_classes or self._classes[0]

    @property
    def class_names(self) -> list[str]:
        """Names of the classes by number; the numbers themselves where the data has no names."""
        self._check_column(data := self._take(self.train_split), self.label)
        feature = data.features[self.label]
        if isinstance(feature, datasets.ClassLabel):
            return list(feature.names)
        numbers = self._classes[1]
        return list(numbers) if numbers else [str(number) for number in range(self.num_classes)]

    def prepare(self) -> None:
        """Download the data and fill the cache of ``datasets``."""
        self._splits  # noqa: B018 - reading it is the work

    def train(self) -> Dataset[Any]:
        """Labelled items to fine-tune on, as they are prepared for training."""
        return self._rows(self._kept["train"], train=True)

    def validation(self) -> Dataset[Any]:
        """Labelled items to choose a checkpoint on."""
        split = self.validation_split
        return self._rows(self._take(split) if split else self._kept["validation"])

    def test(self) -> Dataset[Any]:
        """Labelled items to report on."""
        return self._rows(self._take(self.test_split))

    def calibration(self) -> Dataset[Any]:
        """Unlabeled inputs for statistics; the label column is not even loaded."""
        split = self.calibration_split
        data = self._take(split) if split else self._kept["calibration"]
        return Rows(self._inputs_of(data), self.column, self._prepared(train=False))

    @abstractmethod
    def _prepared(self, *, train: bool) -> Callable[[Any], Any]:
        """What turns a value of the column into the input of a network."""

    @abstractmethod
    def _inputs_of(self, data: datasets.Dataset, *more: str) -> datasets.Dataset:
        """The column of inputs, checked, and further columns."""

    def _rows(self, data: datasets.Dataset, *, train: bool = False) -> "Rows":
        self._check_column(data, self.label)
        numbers = None if self._classes[1] is None else dict(self._classes[1])
        inputs = self._inputs_of(data, self.label)
        return Rows(inputs, self.column, self._prepared(train=train), self.label, numbers)

    def _check_column(self, data: datasets.Dataset, column: str) -> None:
        if column not in data.column_names:
            raise ValueError(
                f"{self.path} has no column '{column}'; it has {', '.join(data.column_names)}. "
                f"Give the names of its columns with '{self._role}' and 'label'."
            )

    @cached_property
    def _splits(self) -> dict[str, datasets.Dataset]:
        return load_splits(self.path, self.kind, self.name, self.revision)

    def _take(self, split: str) -> datasets.Dataset:
        return take(self._splits, split, self.path)

    @cached_property
    def _kept(self) -> dict[str, datasets.Dataset]:
        """The training split, and what is held out of it."""
        data = self._take(self.train_split)
        want = {
            "calibration": 0
            if self.calibration_split
            else _count(self.calibration_size, len(data)),
            "validation": 0 if self.validation_split else _count(self.validation_size, len(data)),
        }
        if sum(want.values()) >= len(data):
            raise ValueError(
                f"the split '{self.train_split}' of {self.path} has {len(data)} {self._unit}, "
                f"too few to hold out {want['validation']} for validation and "
                f"{want['calibration']} for calibration. Make them smaller, or name splits for "
                "them."
            )
        order = np.random.default_rng(self.seed).permutation(len(data))
        ends = np.cumsum(list(want.values()))
        parts = dict(zip((*want, "train"), np.split(order, ends), strict=True))
        return {name: data.select(np.sort(part)) for name, part in parts.items()}

    @cached_property
    def _classes(self) -> tuple[int, dict[Any, int] | None]:
        """Number of classes, and the number of each label that is not an integer already."""
        data = self._take(self.train_split)
        self._check_column(data, self.label)
        feature = data.features[self.label]
        if isinstance(feature, datasets.ClassLabel):
            return feature.num_classes, None
        labels = sorted(set(data[self.label][:]))
        if all(isinstance(label, str) for label in labels):
            return len(labels), {label: number for number, label in enumerate(labels)}
        if not all(isinstance(label, int) for label in labels) or labels[0] < 0:
            raise ValueError(
                f"column '{self.label}' of {self.path} is {feature}; expected class labels, "
                "integers from 0, or strings."
            )
        return labels[-1] + 1, None


class Rows(Dataset[Any]):
    """Rows of a Hugging Face data set as inputs, with labels where a column is named.

    Args:
        data: The rows.
        column: Column of inputs.
        transform: From a value of that column to the input of a network.
        label: Column of labels; None gives inputs alone.
        numbers: Number of each label; None where labels are numbers.
    """

    def __init__(
        self,
        data: datasets.Dataset,
        column: str,
        transform: Callable[[Any], Any],
        label: str | None = None,
        numbers: dict[Any, int] | None = None,
    ) -> None:
        self.data, self.column, self.transform = data, column, transform
        self.label, self.numbers = label, numbers

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        row = self.data[int(index)]
        inputs = self.transform(row[self.column])
        return inputs if self.label is None else (inputs, self._number(row[self.label]))

    def _number(self, label: Any) -> Tensor:
        if self.numbers is not None and label not in self.numbers:
            raise ValueError(
                f"label {label!r} is not among the {len(self.numbers)} labels of the training "
                f"split: {', '.join(list(self.numbers)[:5])}, …"
            )
        return torch.tensor(label if self.numbers is None else self.numbers[label])


def _count(size: int | float, total: int) -> int:
    """A fraction of ``total``, at least one; or a number of rows."""
    return max(1, round(size * total)) if size < 1 else int(size)
