"""Merging thinned-out task vectors block by block, in memory that is used again."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, final

import torch
from torch import Tensor

from lightning_merge.functional.ties import BLOCK, Room
from lightning_merge.methods.walk import BlockMerge

Thin: TypeAlias = Callable[[int, slice, Tensor], None]
"""Thins out, in place, one expert's task vector ``(n,)`` in a part of a span; parts in order."""

Begin: TypeAlias = Callable[[str, int, int], Thin]
"""What thins out a span, from the parameter's name, the span's first entry and its length."""

MergeThinned: TypeAlias = Callable[[int, Tensor, Tensor, Room], Tensor]
"""Merges a block from its first entry's place, its base ``(n,)`` and thinned-out task vectors
``(T, n)``."""


@final
class Rooms:
    """Rooms for one merge: as many as are worked in at the same time, used again and again."""

    def __init__(self) -> None:
        self._free = defaultdict[tuple[int, torch.dtype, torch.device], list[Room]](list)

    @contextmanager
    def room(self, num_experts: int, like: Tensor) -> Iterator[Room]:
        """One that nobody else works in, for blocks of up to ``BLOCK`` entries."""
        free = self._free[num_experts, like.dtype, like.device]
        try:
            room = free.pop()
        except IndexError:
            room = Room(num_experts, BLOCK, like)
        try:
            yield room
        finally:
            free.append(room)


def in_blocks(begin: Begin, merge: MergeThinned, rooms: Rooms) -> BlockMerge:
    """What merges one parameter by thinned-out task vectors, for one walk over its spans."""

    def merge_span(name: str, start: int, base: Tensor, rows: Sequence[Tensor]) -> Tensor:
        wide = torch.promote_types(torch.promote_types(base.dtype, rows[0].dtype), torch.float32)
        thin, merged = begin(name, start, len(base)), torch.empty_like(base)
        with rooms.room(len(rows), base.new_empty(0, dtype=wide)) as room:
            for first in range(0, len(base), BLOCK):
                part = slice(first, min(first + BLOCK, len(base)))
                origin = base[part].to(wide)
                vectors = room.wide(len(origin))[0]
                for t, (row, out) in enumerate(zip(rows, vectors.unbind(), strict=True)):
                    torch.sub(row[part].to(wide), origin, out=out)
                    thin(t, part, out)
                merged[part] = merge(start + first, base[part], vectors, room)
        return merged

    return merge_span
