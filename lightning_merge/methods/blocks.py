"""Merging thinned-out task vectors block by block, in memory that is used again."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_merge.functional.parallel import PerThread
from lightning_merge.functional.ties import BLOCK, Room
from lightning_merge.methods.walk import BlockMerge

Thin: TypeAlias = Callable[[int, slice, Tensor], None]
"""Thins out, in place, one expert's task vector ``(n,)`` in a part of a span; parts in order."""

Begin: TypeAlias = Callable[[str, int, int], Thin]
"""What thins out a span, from the parameter's name, the span's first entry and its length."""

MergeThinned: TypeAlias = Callable[[int, Tensor, Tensor, Room], Tensor]
"""Merges a block from its first entry's place, its base ``(n,)`` and thinned-out task vectors
``(T, n)``."""


def in_blocks(begin: Begin, merge: MergeThinned) -> BlockMerge:
    """What merges one parameter by thinned-out task vectors, for one walk over its spans."""
    room: PerThread[Room] | None = None

    def merge_span(name: str, start: int, base: Tensor, rows: Sequence[Tensor]) -> Tensor:
        nonlocal room
        wide = torch.promote_types(torch.promote_types(base.dtype, rows[0].dtype), torch.float32)
        room = room or PerThread(partial(Room, len(rows), BLOCK, base.new_empty(0, dtype=wide)))
        mine, thin, merged = room.get(), begin(name, start, len(base)), torch.empty_like(base)
        for first in range(0, len(base), BLOCK):
            part = slice(first, min(first + BLOCK, len(base)))
            origin = base[part].to(wide)
            vectors = mine.wide(len(origin))[0]
            for t, (row, out) in enumerate(zip(rows, vectors.unbind(), strict=True)):
                torch.sub(row[part].to(wide), origin, out=out)
                thin(t, part, out)
            merged[part] = merge(start + first, base[part], vectors, mine)
        return merged

    return merge_span
