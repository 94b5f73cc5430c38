"""Reading Hugging Face data sets from wherever they are."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from datasets import (
    Dataset,
    DatasetDict,
    ReadInstruction,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
    load_from_disk,
)
from datasets.utils.logging import is_progress_bar_enabled

Kind = Literal["auto", "hub", "folder", "parquet", "disk"]


def load_splits(
    path: str, kind: Kind, name: str | None, revision: str | None
) -> dict[str, Dataset]:
    """All splits of a data set.

    Args:
        path: Name on the Hub, image folder, parquet file or folder of them, or a folder of
            ``save_to_disk``.
        kind: Which of these; 'auto' finds out.
        name: Configuration of a data set on the Hub.
        revision: Commit, tag or branch of a data set on the Hub.

    Raises:
        ValueError: If there is no such data, or it cannot be read.
    """
    kind = detect_kind(path) if kind == "auto" else kind
    if kind != "hub" and not Path(path).exists():
        raise ValueError(f"{path} does not exist (kind '{kind}'). Check the path.")
    options: dict[str, Any]
    if kind == "disk":
        return _explained(path, kind, lambda: load_from_disk(path))
    if kind == "hub":
        options = {"path": path, "name": name, "revision": revision}
    elif Path(path).is_file():
        options = {"path": "parquet", "data_files": path}
    else:
        options = {"path": "parquet" if kind == "parquet" else "imagefolder", "data_dir": path}
    return _explained(path, kind, lambda: load_dataset(**options))


def detect_kind(path: str) -> Kind:
    """What a path is: what stands there decides, and where nothing stands it is a Hub name.

    Raises:
        ValueError: If nothing stands there, and it cannot be a name on the Hub.
    """
    place = Path(path)
    if (place / "dataset_dict.json").exists() or (place / "state.json").exists():
        return "disk"
    if place.is_file():
        if place.suffix == ".parquet":
            return "parquet"
        raise ValueError(
            f"{path} is a file, but no .parquet file; give a folder or a parquet file."
        )
    if place.is_dir():
        return "parquet" if next(place.rglob("*.parquet"), None) else "folder"
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or place.suffix == ".parquet":
        raise ValueError(f"{path} does not exist, and is no name on the Hugging Face Hub either.")
    return "hub"


def take(splits: dict[str, Dataset], split: str, path: str) -> Dataset:
    """One split, or a slice or sum of splits in the notation of ``datasets``: ``train[:80%]``.

    Raises:
        ValueError: If there is no such split, or it is empty.
    """
    there = ", ".join(f"{name} ({len(data)})" for name, data in splits.items())
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(
            {name: len(data) for name, data in splits.items()}
        )
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"{path} has no split '{split}' ({str(error).splitlines()[0]}). It has {there}."
        ) from error
    slices = [splits[p.splitname].select(range(p.from_, max(p.from_, p.to))) for p in parts]
    if not sum(map(len, slices)):
        raise ValueError(f"the split '{split}' of {path} is empty. It has {there}.")
    return slices[0] if len(slices) == 1 else concatenate_datasets(slices)


def save_splits(splits: Mapping[str, Dataset], path: Path) -> None:
    """Write splits as a ``save_to_disk`` folder, in one step: all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        DatasetDict(splits).save_to_disk(temporary / path.name)
        os.rename(temporary / path.name, path)  # noqa: PTH104 - fails where the target is not empty
    finally:
        shutil.rmtree(temporary)
        if shown:
            enable_progress_bars()


def _explained(
    path: str, kind: str, load: Callable[[], DatasetDict | Dataset]
) -> dict[str, Dataset]:
    """Call a loader of ``datasets``; its errors become one that names the data and the way out."""
    try:
        loaded = load()
    except Exception as error:  # datasets raises a dozen unrelated classes here
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if kind == "hub":
            raise ValueError(
                f"cannot load '{path}' from the Hugging Face Hub ({reason}). Nothing of that name "
                "stands on disk. Check the name; without a network, give the path of an image "
                "folder, of parquet files, or of a save_to_disk folder."
            ) from error
        raise ValueError(
            f"cannot read {path} as '{kind}' data ({reason}). Give its 'kind', or write it again."
        ) from error
    if isinstance(loaded, Dataset):
        return {"train": loaded}
    return {str(name): split for name, split in loaded.items()}
