"""Images of any Hugging Face data set as a task."""

from collections.abc import Callable
from typing import Any

import datasets

from lightning_merge.data.columns import ColumnTask


class ImageTask(ColumnTask):
    """Image classification on a Hugging Face data set: from the Hub, or from files.

    Args:
        path: Name on the Hub, image folder, parquet file or folder of them, or a folder of
            save_to_disk.
        transform: From a PIL image to a tensor; see TimmTransform and PlainTransform.
        train_transform: The same for training, to augment. None: ``transform``.
        image: Column of images.
        options: Splits, labels and the rest, as ColumnTask takes them.
    """

    _unit = "images"
    _role = "image"

    def __init__(
        self,
        path: str,
        transform: Callable[[Any], Any],
        train_transform: Callable[[Any], Any] | None = None,
        image: str = "image",
        **options: Any,
    ) -> None:
        super().__init__(path, column=image, **options)
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
