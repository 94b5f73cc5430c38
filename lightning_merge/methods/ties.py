"""TIES: keep the largest entries, agree on a sign, merge what has it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from lightning_merge.functional.adamerging import agreeing
from lightning_merge.functional.parallel import map_on_cores
from lightning_merge.functional.selection import BLOCK as CHUNK
from lightning_merge.functional.selection import Count, Search, num_kept
from lightning_merge.functional.task_arithmetic import add_update, task_vectors_of
from lightning_merge.functional.ties import (
    BLOCK,
    Combine,
    ZeroSign,
    block_consensus,
    elect,
    sign_consensus,
    trim,
    trim_by,
)
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.checks import check_density, check_scale
from lightning_merge.methods.rules import coefficients_of
from lightning_merge.methods.walk import BlockMerge, map_blocks
from lightning_merge.states import StateDict, shape_of


class _Cut(NamedTuple):
    """What one expert keeps of one parameter."""

    threshold: float
    below: float
    """The next smaller number, above which lie all entries that tie as well."""
    ties: tuple[int, ...]
    """How many of the entries at the threshold are kept, in every chunk."""
    tied: tuple[int, ...]
    """And how many there are."""

    def within(self, start: int = 0, size: int | None = None) -> tuple[float, int]:
        """Threshold and ties to keep in a part that starts and ends with chunks, or in all."""
        part = slice(start // CHUNK, None if size is None else math.ceil((start + size) / CHUNK))
        ties, tied = sum(self.ties[part]), sum(self.tied[part])
        # none to count where all are kept, as in nearly every part
        return (self.below, 0) if ties and ties == tied else (self.threshold, ties)


@final
@dataclass(frozen=True, kw_only=True)
class TIES(WeightMethod):
    """Trims each task vector to its largest entries, elects signs, and merges what agrees."""

    density: float = 0.2
    """Fraction of the entries of a task vector to keep, in (0, 1]."""

    scale: float = 1.0
    """Coefficient λ of the merged task vector; 0.3 is usual with ``merge: sum``."""

    scope: Literal["global", "tensor"] = "global"
    """Rank the entries of the whole model (the paper), or of each parameter on its own."""

    combine: Combine = "mean"
    """What becomes of the entries with the elected sign: mean, sum, or largest magnitude."""

    zero_sign: ZeroSign = "majority"
    """Sign where the task vectors cancel: that of most entries of the scope, plus, or no entry."""

    count: Count = "round"
    """How many entries a density is: rounded, rounded down, or as the authors' code (one more)."""

    def __post_init__(self) -> None:
        check_density(self.density)
        check_scale(self.scale)

    def bind(self, base: StateDict, experts: Mapping[str, StateDict]) -> WeightMethod:
        """Find the cuts of the scope in passes of their own, so that the merge can go by blocks."""
        model = _Model(self, base, experts)
        # by name: a file keeps its tensors in another order than the model it was written from,
        # and of entries that tie for the last place the first ones stay
        names = sorted(self.method_names(base))
        if self.scope == "tensor":
            return self.bound_to_blocks(lambda name: self._merger(model, [name], name))
        cuts = model.cuts(names)
        majority = cache(lambda: model.majority_sign(names, cuts))
        return self.bound_to_blocks(lambda name: self._merger_of(cuts[name], majority))

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter, trimmed on its own: the scope ``tensor``."""
        trimmed = trim(task_vectors_of(base, experts), self.density, self.count)
        return add_update(base, sign_consensus(trimmed, self.combine, self.zero_sign), self.scale)

    def _merger(self, model: "_Model", scope: list[str], name: str) -> BlockMerge:
        cuts = model.cuts(scope)
        majority = cache(lambda: model.majority_sign(scope, cuts))
        return self._merger_of(cuts[name], majority)

    def _merger_of(self, cuts: Sequence[_Cut], majority: Callable[[], float]) -> BlockMerge:
        return _blockwise(cuts, partial(self._merge_trimmed, majority))

    def _merge_trimmed(
        self, majority: Callable[[], float], base: Tensor, trimmed: Tensor
    ) -> Tensor:
        update = block_consensus(trimmed, self.combine, self.zero_sign, majority)
        return add_update(base, update, self.scale)


def _blockwise(cuts: Sequence[_Cut], merge: Callable[[Tensor, Tensor], Tensor]) -> BlockMerge:
    """Merge trimmed blocks."""

    def merge_block(name: str, start: int, base: Tensor, rows: Sequence[Tensor]) -> Tensor:
        merged = torch.empty_like(base)
        if not len(base):
            return merged
        trim = _Trim([cut.within(start, len(base)) for cut in cuts])
        space = trim.space(base[:BLOCK], rows)
        # split once: a slice costs as much as an operation on a small block
        pieces = zip(*(whole.split(BLOCK) for whole in (merged, base, *rows)), strict=True)
        for out, origin, *parts in pieces:
            out.copy_(merge(origin, trim(origin, parts, space)))
        return merged

    return merge_block


class _Trim:
    """Trims one part of a parameter block by block, and keeps count of the ties still to keep."""

    def __init__(self, cuts: Sequence[tuple[float, int]]) -> None:
        self.thresholds = [threshold for threshold, _ in cuts]
        self.ties = [ties for _, ties in cuts]

    def space(self, base: Tensor, rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Room for the trimmed entries of all rows, to be used again."""
        wide = torch.promote_types(torch.promote_types(base.dtype, rows[0].dtype), torch.float32)
        stack = base.new_empty((len(rows), len(base)), dtype=wide)
        return (stack, *stack)

    def __call__(
        self, base: Tensor, rows: Sequence[Tensor], space: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        stack, *trimmed = space or self.space(base, rows)
        if stack.shape[1] != len(base):
            stack, *trimmed = self.space(base, rows)
        origin = base.to(stack.dtype)
        for t, (row, out) in enumerate(zip(rows, trimmed, strict=True)):
            torch.sub(row if row.dtype == stack.dtype else row.to(stack.dtype), origin, out=out)
            if self.ties[t] == 0:
                torch.hardshrink(out, self.thresholds[t], out=out)
                continue
            kept, used = trim_by(out, self.thresholds[t], self.ties[t])
            out.copy_(kept)
            self.ties[t] -= used
        return stack


def _elected(base: Tensor, trimmed: Tensor) -> Tensor:
    return elect(trimmed)


@dataclass(frozen=True)
class _Model:
    """A base and its experts, read one parameter at a time."""

    method: TIES
    base: StateDict
    experts: Mapping[str, StateDict]

    def cuts(self, names: list[str]) -> dict[str, list[_Cut]]:
        """Threshold and ties to keep of every expert, in each of the parameters of one scope."""
        size = sum(math.prod(shape_of(self.base, name)) for name in names)
        kept = num_kept(self.method.density, size, self.method.count)

        tasks = tuple(self.experts)
        searches = [Search(size, kept) for _ in tasks]
        for task, search in zip(tasks, searches, strict=True):
            if search.stride:
                search.take(self._sample(names, task, search.stride))
        while open_ones := {
            task: s for task, s in zip(tasks, searches, strict=True) if s.cut is None
        }:
            self._look(names, open_ones)
            for search in open_ones.values():
                search.conclude()
        found = [search.cut for search in searches if search.cut]
        cuts: dict[str, list[_Cut]] = {name: [] for name in names}
        for task, cut in zip(tasks, found, strict=True):
            start = 0
            for name in names:
                stop = start + math.ceil(math.prod(shape_of(self.base, name)) / CHUNK)
                ties, tied = cut.ties[start:stop], cut.tied[start:stop]
                below = self._below(cut.threshold, name, task) if any(ties) else cut.threshold
                cuts[name].append(_Cut(cut.threshold, below, ties, tied))
                start = stop
        return cuts

    def _below(self, threshold: float, name: str, task: str) -> float:
        """The next smaller number, above which lie all entries that tie as well: none to count."""
        read = self.method.task_vector_reader(name, self.base, task, self.experts[task])
        value = read(slice(1))
        return float(torch.nextafter(torch.full_like(value, threshold), torch.zeros_like(value)))

    def majority_sign(self, names: list[str], cuts: Mapping[str, Sequence[_Cut]]) -> float:
        """Sign of most entries of the scope: a pass of its own, asked for only where needed."""
        total = 0.0
        for name in names:
            signs = map_blocks(
                _blockwise(cuts[name], _elected),
                name,
                self.base[name].detach(),
                self.experts,
                coefficients_of(name, tuple(self.experts), self.method.coefficients),
            )
            total += float(signs.sum(dtype=torch.float64))
        return float(np.sign(total))

    def _look(self, names: list[str], searches: Mapping[str, Search]) -> None:
        """Look at all task vectors chunk by chunk, so that the base is read once."""
        first = 0
        for name in names:
            read = [
                self.method.task_vector_reader(name, self.base, task, self.experts[task])
                for task in searches
            ]
            look = partial(_look, read, tuple(searches.values()), first)
            chunks = range(-(-math.prod(shape_of(self.base, name)) // CHUNK))
            map_on_cores(look, chunks, size=CHUNK * len(read))
            first += len(chunks)

    def _sample(self, names: list[str], task: str, stride: int) -> Iterator[Tensor]:
        for name in names:
            read = self.method.task_vector_reader(name, self.base, task, self.experts[task])
            yield read(slice(None, None, stride))


def _look(
    read: Sequence[Callable[[slice], Tensor]], searches: Sequence[Search], first: int, chunk: int
) -> None:
    part = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
    for read_one, search in zip(read, searches, strict=True):
        search.look(first + chunk, read_one(part))


def agreeing_task_vectors(
    method: TIES, base: StateDict, experts: Mapping[str, StateDict]
) -> Iterator[tuple[str, Tensor]]:
    """Task vectors trimmed over the whole model, and of those the entries with the elected sign.

    What TIES takes the mean of, one by one, as AdaMerging++ needs them.

    Args:
        method: Its density, count of entries and parameters.
        base: The pre-trained weights.
        experts: Fine-tuned weights by task.

    Returns:
        By name, flat, of shape ``(T, n)`` in float32 or wider.
    """
    model = _Model(method, base, experts)
    names = sorted(method.method_names(base))
    cuts = model.cuts(names)
    majority = model.majority_sign(names, cuts)
    for name in names:
        rows = [expert[name].detach().reshape(-1) for expert in experts.values()]
        trimmed = _Trim([cut.within() for cut in cuts[name]])(base[name].detach().reshape(-1), rows)
        signs = elect(trimmed)
        cancelled = (signs == 0) & (trimmed != 0).any(0)
        yield name, agreeing(trimmed, torch.where(cancelled, majority, signs))
