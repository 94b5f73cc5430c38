"""Texts of any Hugging Face data set as a task."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, final

import datasets
from torch import Tensor

from lightning_merge.data.columns import ColumnTask
from lightning_merge.packages import package_path


class TextTask(ColumnTask):
    """Text classification on a Hugging Face data set: from the Hub, or from files.

    Inputs are ``{"input_ids": (max_length,), "attention_mask": (max_length,)}``, int64, as
    transformers take them.

    Args:
        path: Name on the Hub, parquet file or folder of them, or a folder of save_to_disk.
        tokenizer: From a text to its tokens; see Tokens.
        text: Column of texts.
        options: Splits, labels and the rest, as ColumnTask takes them.
    """

    _unit = "texts"
    _role = "text"

    def __init__(
        self,
        path: str,
        tokenizer: Callable[[str], Any],
        text: str = "text",
        **options: Any,
    ) -> None:
        super().__init__(path, column=text, **options)
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
