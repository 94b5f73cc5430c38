"""Writing a safetensors file one tensor after the other, so that it is never whole in memory."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_merge.files import replacing
from lightning_merge.states import DTYPES, StateDict, dtype_of, shape_of

CODES = {dtype: code for code, dtype in DTYPES.items()}
"""What torch and safetensors call the same dtype."""

Write: TypeAlias = Callable[[str, Tensor], None]


@contextmanager
def writing_tensors(
    path: str | Path, layout: StateDict, metadata: Mapping[str, str] | None = None
) -> Iterator[Write]:
    """Give a function that writes one named tensor; the file appears once all are written.

    Args:
        path: The file. On an error it is as it was.
        layout: Names, shapes and dtypes of the tensors, such as the base of a merge; of a lazily
            read one no value is read.
        metadata: String pairs of the header.

    Raises:
        ValueError: If a tensor is not of the layout, comes twice, or is missing at the end.
        OSError: If the disk is full or the path cannot be written to.
    """
    places = _places(layout)
    with replacing(path) as temporary, temporary.open("wb") as file:
        start = file.write(_header(layout, places, metadata))
        written: set[str] = set()

        def write(name: str, tensor: Tensor) -> None:
            _check(path, layout, name, tensor, written)
            file.seek(start + places[name][0])
            values = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(values.view(torch.uint8).numpy().data)
            written.add(name)

        yield write
        missing = [name for name in layout if name not in written]
        if missing:
            raise ValueError(
                f"{path}: {len(missing)} of {len(places)} tensors were not written: {missing[:5]}. "
                "Give every tensor of the layout."
            )


def bytes_of(layout: StateDict, name: str) -> int:
    """Bytes of one tensor, without reading it where that is possible."""
    return math.prod(shape_of(layout, name)) * _width(layout, name)


def _width(layout: StateDict, name: str) -> int:
    dtype = dtype_of(layout, name)
    if dtype not in CODES:
        raise ValueError(f"'{name}' is {dtype}, which cannot be written; cast it, or leave it out.")
    found: torch.dtype = getattr(torch, dtype)
    return found.itemsize


def _places(layout: StateDict) -> dict[str, tuple[int, int]]:
    """First and last byte of each tensor: the widest dtypes first, so that all are aligned."""
    places, end = {}, 0
    for name in sorted(layout, key=lambda name: (-_width(layout, name), name)):
        places[name] = end, end + bytes_of(layout, name)
        end = places[name][1]
    return places


def _header(
    layout: StateDict, places: Mapping[str, tuple[int, int]], metadata: Mapping[str, str] | None
) -> bytes:
    """The length of the header in eight bytes, and the header, padded with spaces."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, place in places.items():
        dtype = CODES[dtype_of(layout, name)]
        shape = list(shape_of(layout, name))
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": list(place)}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _check(
    path: str | Path, layout: StateDict, name: str, tensor: Tensor, written: set[str]
) -> None:
    if name not in layout:
        raise ValueError(f"{path}: '{name}' is not in the layout of the file.")
    if name in written:
        raise ValueError(f"{path}: '{name}' was written before; names must differ.")
    found = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    expected = shape_of(layout, name), dtype_of(layout, name)
    if found != expected:
        raise ValueError(
            f"{path}: '{name}' is {found[1]} {found[0]}, expected {expected[1]} {expected[0]} as "
            "in the layout."
        )
