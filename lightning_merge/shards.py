"""Models in several safetensors files with an index, in the layout of the Hugging Face Hub."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import final

from torch import Tensor

from lightning_merge.files import write_json
from lightning_merge.states import (
    Described,
    LazyStateDict,
    StateDict,
    dtype_of,
    kind_of,
    shape_of,
)
from lightning_merge.tensor_files import bytes_of, writing_tensors

INDEX = "model.safetensors.index.json"


def write_sharded(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    layout: StateDict,
    max_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Write named tensors as they come, one of them in memory.

    Args:
        folder: Gets ``model-00001-of-0000N.safetensors`` and the index, which is written last;
            ``model.safetensors`` alone where one file holds everything.
        tensors: In the order of ``layout``; ``WeightMethod.stream`` gives them.
        layout: Names, shapes and dtypes of the tensors: the base of a merge, of which no value is
            read where it is read lazily. The files are planned from it.
        max_bytes: Largest size of a file; a larger tensor gets a file of its own.

    Returns:
        The files, without the index.

    Raises:
        ValueError: If the tensors are not those of the layout.
        OSError: If the disk is full or the folder cannot be written to.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, found {max_bytes}.")
    sizes = {name: bytes_of(layout, name) for name in layout}
    shards = plan_shards(sizes, max_bytes)
    number = max(shards.values(), default=0) + 1
    names = [
        "model.safetensors" if number == 1 else f"model-{i + 1:05d}-of-{number:05d}.safetensors"
        for i in range(number)
    ]
    folder, rest = Path(folder), iter(tensors)
    for shard, name in enumerate(names):
        part = _Part(layout, [key for key in layout if shards[key] == shard])
        with writing_tensors(folder / name, part) as write:
            for key, tensor in islice(rest, len(part)):
                write(key, tensor)
    if more := next(rest, None):
        raise ValueError(f"{folder}: '{more[0]}' is not in the layout of the model.")
    if number > 1:
        weight_map = {name: names[shard] for name, shard in shards.items()}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
    return [folder / name for name in names]


@final
class _Part(Described):
    """Some of the tensors of a state dict, which are not read until they are asked for."""

    def __init__(self, state: StateDict, names: Sequence[str]) -> None:
        self._state, self._names = state, dict.fromkeys(names)

    def shape(self, name: str) -> tuple[int, ...]:
        return shape_of(self._state, name)

    def kind(self, name: str) -> str:
        return kind_of(self._state, name)

    def dtype(self, name: str) -> str:
        return dtype_of(self._state, name)

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def plan_shards(sizes: Mapping[str, int], max_bytes: int) -> dict[str, int]:
    """Number of the file of each tensor: filled in order, a new one where the next is too much.

    Example:
        >>> plan_shards({"a": 3, "b": 3, "c": 9, "d": 1}, max_bytes=6)
        {'a': 0, 'b': 0, 'c': 1, 'd': 2}
    """
    shards: dict[str, int] = {}
    shard, filled = 0, 0
    for name, size in sizes.items():
        if filled and filled + size > max_bytes:
            shard, filled = shard + 1, 0
        shards[name] = shard
        filled += size
    return shards


@final
class ShardedStateDict(Described):
    """A model in several safetensors files, read lazily.

    Args:
        folder: Holds the index and the files that it names; what is missing or damaged is a
            ``ValueError`` that names it.
    """

    def __init__(self, folder: str | Path) -> None:
        index = Path(folder) / INDEX
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{index} is not a readable index of safetensors files ({error}). Write the model "
                "again, or open a single file."
            ) from error
        self._weight_map: dict[str, str] = dict(weight_map)
        files = sorted(set(self._weight_map.values()))
        self._files = {name: LazyStateDict(Path(folder) / name) for name in files}
        lost = [name for name, file in self._weight_map.items() if name not in self._files[file]]
        if lost:
            raise ValueError(f"{index} names {len(lost)} tensors no file holds: {lost[:5]}.")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header of its file."""
        return self._file_of(name).shape(name)

    def kind(self, name: str) -> str:
        """Kind of one tensor, from the header of its file."""
        return self._file_of(name).kind(name)

    def dtype(self, name: str) -> str:
        """Dtype of one tensor, from the header of its file."""
        return self._file_of(name).dtype(name)

    def _file_of(self, name: str) -> LazyStateDict:
        return self._files[self._weight_map[name]]

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of(name)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weight_map)

    def __len__(self) -> int:
        return len(self._weight_map)
