"""Texts of any Hugging Face data set as a task."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, final

import datasets
from torch import Tensor

from lightning_merge.data.columns import ColumnTask
from lightning_merge.data.sources import Kind
from lightning_merge.packages import package_path


class TextTask(ColumnTask):
    """Text classification on a Hugging Face data set: from the Hub, or from files.

    Inputs are ``{"input_ids": (max_length,), "attention_mask": (max_length,)}``, int64, as
    transformers take them. Splits that are not named are held out as in ImageTask. Nothing is
    read before a split is asked for.

    Args:
        path: Name on the Hub, parquet file or folder of them, or a folder of save_to_disk.
        tokenizer: From a text to its tokens; see Tokens.
        train_split: Split to fine-tune on; slices work everywhere, as in 'train[:80%]'.
        validation_split: Split to choose a checkpoint on. None: held out of the training split.
        test_split: Split to report on.
        calibration_split: Split of unlabeled inputs for statistics; its labels are never read.
            None: held out of the training split.
        validation_size: How much to hold out: a fraction below 1, or a number of texts.
        calibration_size: The same for calibration.
        text: Column of texts.
        label: Column of labels: class labels, integers from 0, or strings.
        num_classes: Number of classes. None: from the class names of the label column, or else
            from the labels of the training split.
        kind: What ``path`` is; 'auto' finds out.
        name: Configuration of a data set on the Hub.
        revision: Commit, tag or branch of a data set on the Hub.
        seed: Seed of what is held out.
    """

    _unit = "texts"
    _role = "text"

    def __init__(
        self,
        path: str,
        tokenizer: Callable[[str], Any],
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str = "test",
        calibration_split: str | None = None,
        validation_size: int | float = 0.1,
        calibration_size: int | float = 0.1,
        text: str = "text",
        label: str = "label",
        num_classes: int | None = None,
        kind: Kind = "auto",
        name: str | None = None,
        revision: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            path,
            column=text,
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
        self.tokenizer = tokenizer

    def _prepared(self, *, train: bool) -> Callable[[Any], Any]:
        return self.tokenizer

    def _inputs_of(self, data: datasets.Dataset, *more: str) -> datasets.Dataset:
        self._check_column(data, self.column)
        found = data.features[self.column]
        if getattr(found, "dtype", None) not in ("string", "large_string"):
            raise ValueError(
                f"column '{self.column}' of {self.path} is {found}; expected texts. Give the name "
                "of the column of texts with 'text'."
            )
        return data.select_columns([self.column, *more])


@final
class Tokens:
    """A text as tokens of a fixed length: longer ones are cut, shorter ones padded.

    A fixed length lets inputs of all texts be stored and batched as one tensor.

    Args:
        path: Folder with a tokenizer, as ``save_pretrained`` writes it; its name on the Hugging
            Face Hub; or ``PACKAGE:FOLDER`` of an installed package.
        max_length: Tokens of every input.
    """

    def __init__(self, path: str, max_length: int = 64) -> None:
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, got {max_length}.")
        self.path, self.max_length = path, max_length

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ValueError(
                "transformers is not installed: pip install 'lightning-merge[text]'."
            ) from error
        place = package_path(self.path)
        try:
            return AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"cannot read a tokenizer from '{place}' ({str(error).splitlines()[0]}). Give a "
                "folder of save_pretrained, or a name on the Hub where there is a network."
            ) from error

    def __call__(self, text: str) -> dict[str, Tensor]:
        """The text as ``input_ids`` and ``attention_mask``, int64 of shape (max_length,)."""
        found = self._tokenizer(
            text,
            truncation=True,
            padding="max_length",
            max_length=self.max_length,
            return_tensors="pt",
        )
        return {name: found[name][0] for name in ("input_ids", "attention_mask")}
