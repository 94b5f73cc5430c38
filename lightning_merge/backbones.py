"""The backbone of a merged model on disk: one file, or several with an index above a size."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lightning_merge.files import write_tensors
from lightning_merge.shards import ShardedStateDict, write_sharded
from lightning_merge.states import LazyStateDict

FILE, FOLDER = "backbone.safetensors", "backbone"
"""One file, or a folder of several in the layout of the Hugging Face Hub."""

SHARD_SIZE = 5_000_000_000
"""Bytes from which a backbone is written in several files."""

UNITS = {"": 1, **{f"{unit}B": 1000 ** (i + 1) for i, unit in enumerate("KMGT")}} | {
    f"{unit}iB": 1024 ** (i + 1) for i, unit in enumerate("KMGT")
}


def parse_size(text: str | int) -> int:
    """A number of bytes from words such as ``5GB``, ``500 MB`` or ``2GiB``.

    Raises:
        ValueError: If it is not a positive size.

    Example:
        >>> parse_size("5GB"), parse_size("1.5 MiB"), parse_size(1000)
        (5000000000, 1572864, 1000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)?\s*", str(text))
    size = int(float(found[1]) * UNITS[found[2] or ""]) if found else 0
    if size < 1:
        raise ValueError(f"expected a size such as 5GB, 500MB or 2GiB, found {text!r}.")
    return size


def write_backbone(folder: Path, tensors: Mapping[str, Tensor], shard_size: int) -> None:
    """Write ``backbone.safetensors``, or above a size ``backbone/`` with shards and their index.

    Args:
        folder: Folder of the merged model.
        tensors: By name, each once.
        shard_size: Bytes of a file, at most; a larger tensor gets a file of its own.
    """
    if sum(tensor.nbytes for tensor in tensors.values()) <= shard_size:
        write_tensors(folder / FILE, tensors)
    else:
        (folder / FOLDER).mkdir()
        write_sharded(folder / FOLDER, tensors.items(), tensors, shard_size)


def read_backbone(folder: Path) -> LazyStateDict | ShardedStateDict:
    """What :func:`write_backbone` wrote, read lazily.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    if (folder / FOLDER).is_dir():
        return ShardedStateDict(folder / FOLDER)
    return LazyStateDict(folder / FILE)
