"""Images of any Hugging Face data set as a task."""

from collections.abc import Callable
from typing import Any

import datasets

from lightning_merge.data.columns import ColumnTask
from lightning_merge.data.sources import Kind


class ImageTask(ColumnTask):
    """Image classification on a Hugging Face data set: from the Hub, or from files.

    A split that is not named is held out of the training split: ``seed`` shuffles its positions,
    the first ``calibration_size`` of them are calibration, the next ``validation_size`` are
    validation, the rest is trained on. So splits never share an image, and they are the same on
    every machine. Nothing is read before a split is asked for.

    Args:
        path: Name on the Hub, image folder, parquet file or folder of them, or a folder of
            save_to_disk.
        transform: From a PIL image to a tensor; see TimmTransform and PlainTransform.
        train_transform: The same for training, to augment. None: ``transform``.
        train_split: Split to fine-tune on; slices work everywhere, as in 'train[:80%]'.
        validation_split: Split to choose a checkpoint on. None: held out of the training split.
        test_split: Split to report on.
        calibration_split: Split of unlabeled inputs for statistics; its labels are never read.
            None: held out of the training split.
        validation_size: How much to hold out: a fraction below 1, or a number of images.
        calibration_size: The same for calibration.
        image: Column of images.
        label: Column of labels: class labels, integers from 0, or strings.
        num_classes: Number of classes. None: from the class names of the label column, or else
            from the labels of the training split.
        kind: What ``path`` is; 'auto' finds out.
        name: Configuration of a data set on the Hub.
        revision: Commit, tag or branch of a data set on the Hub.
        seed: Seed of what is held out.
    """

    _unit = "images"
    _role = "image"

    def __init__(
        self,
        path: str,
        transform: Callable[[Any], Any],
        train_transform: Callable[[Any], Any] | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str = "test",
        calibration_split: str | None = None,
        validation_size: int | float = 0.1,
        calibration_size: int | float = 0.1,
        image: str = "image",
        label: str = "label",
        num_classes: int | None = None,
        kind: Kind = "auto",
        name: str | None = None,
        revision: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            path,
            column=image,
            label=label,
            train_split=train_split,
            validation_split=validation_split,
            test_split=test_split,
            calibration_split=calibration_split,
            validation_size=validation_size,
            calibration_size=calibration_size,
            num_classes=num_classes,
            kind=kind,
            name=name,
            revision=revision,
            seed=seed,
        )
        self.transform, self.train_transform = transform, train_transform or transform

    def _prepared(self, *, train: bool) -> Callable[[Any], Any]:
        return self.train_transform if train else self.transform

    def _inputs_of(self, data: datasets.Dataset, *more: str) -> datasets.Dataset:
        self._check_column(data, self.column)
        data = data.select_columns([self.column, *more])
        if isinstance(data.features[self.column], datasets.Image):
            return data
        try:
            return data.cast_column(self.column, datasets.Image())
        except Exception as error:  # pyarrow has many classes for a cast that fails
            raise ValueError(
                f"column '{self.column}' of {self.path} is {data.features[self.column]}, which "
                "holds no images: expected encoded images, or paths of image files."
            ) from error
