"""TIES: keep the largest entries, agree on a sign, merge what has it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from lightning_merge.functional.adamerging import agreeing
from lightning_merge.functional.parallel import PerThread, map_on_cores
from lightning_merge.functional.selection import BLOCK as CHUNK
from lightning_merge.functional.selection import Count, Search, num_kept
from lightning_merge.functional.task_arithmetic import add_update, task_vectors_of
from lightning_merge.functional.ties import (
    Combine,
    Room,
    ZeroSign,
    block_consensus,
    elect,
    sign_consensus,
    trim,
    trim_by,
)
from lightning_merge.methods.base import TaskVectorReader, WeightMethod
from lightning_merge.methods.blocks import MergeThinned, Rooms, in_blocks
from lightning_merge.methods.checks import check_density, check_scale, in_order
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

    weights: dict[str, float] | None = None
    """Weight of each expert by task, at least 0, in the election and the mean; null: all alike."""

    def __post_init__(self) -> None:
        check_density(self.density)
        check_scale(self.scale)
        if self.weights is not None:
            self._check_weights(list(self.weights.values()))

    def bind(self, base: StateDict, experts: Mapping[str, StateDict]) -> WeightMethod:
        """Find the cuts of the scope in passes of their own, so that the merge can go by blocks."""
        if self.weights is not None and list(self.weights) != list(experts):
            return replace(self, weights=in_order(self.weights, experts)).bind(base, experts)
        model, rooms = _Model(self, base, experts), Rooms()
        # by name: a file keeps its tensors in another order than the model it was written from,
        # and of entries that tie for the last place the first ones stay
        names = sorted(self.method_names(base))
        if self.scope == "tensor":
            return self.bound_to_blocks(
                lambda name: self._merger(model, [name], name, rooms), on_cores=False
            )
        cuts = model.cuts(names)
        # at once and by all cores: somewhere in a large model task vectors always cancel
        sign = model.majority_sign(names, cuts) if self.zero_sign == "majority" else 0.0
        return self.bound_to_blocks(
            lambda name: self._merger_of(cuts[name], lambda: sign, rooms), on_cores=False
        )

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter, trimmed on its own: the scope ``tensor``."""
        trimmed = trim(task_vectors_of(base, experts), self.density, self.count)
        update = sign_consensus(trimmed, self.combine, self.zero_sign, weights=self.weight_vector())
        return add_update(base, update, self.scale)

    def weight_vector(self) -> Tensor | None:
        """The weights in the order they are given in, or None: all alike."""
        if self.weights is None:
            return None
        return torch.tensor(list(self.weights.values()), dtype=torch.float64)

    def _check_weights(self, weights: Sequence[float]) -> None:
        if not all(0 <= w < math.inf for w in weights) or not sum(weights) > 0:
            raise ValueError(
                "weights must be finite, at least 0, and not all 0; a negative coefficient turns "
                f"a task vector round (forgetting). Found {self.weights}."
            )
        if self.combine == "max":
            raise ValueError("weights have no part in combine: max; use coefficients there.")

    def _merger(self, model: "_Model", scope: list[str], name: str, rooms: Rooms) -> BlockMerge:
        cuts = model.cuts(scope)
        sign = cache(lambda: model.majority_sign(scope, cuts))
        return self._merger_of(cuts[name], sign, rooms)

    def _merger_of(
        self, cuts: Sequence[_Cut], majority: Callable[[], float], rooms: Rooms
    ) -> BlockMerge:
        return _blockwise(cuts, partial(self._merge_trimmed, majority), rooms)

    def _merge_trimmed(
        self, majority: Callable[[], float], start: int, base: Tensor, trimmed: Tensor, room: Room
    ) -> Tensor:
        weights = self.weight_vector()
        update = block_consensus(trimmed, self.combine, self.zero_sign, majority, room, weights)
        return add_update(base, update, self.scale)


class _Trim:
    """Trims the task vectors of a span part by part, and keeps count of the ties still to keep."""

    def __init__(self, cuts: Sequence[_Cut], start: int = 0, size: int | None = None) -> None:
        found = [cut.within(start, size) for cut in cuts]
        self._thresholds = [threshold for threshold, _ in found]
        self._ties = [ties for _, ties in found]

    def __call__(self, t: int, part: slice, vector: Tensor) -> None:
        if self._ties[t] == 0:
            torch.hardshrink(vector, self._thresholds[t], out=vector)
            return
        kept, used = trim_by(vector, self._thresholds[t], self._ties[t])
        vector.copy_(kept)
        self._ties[t] -= used


def _blockwise(cuts: Sequence[_Cut], merge: MergeThinned, rooms: Rooms) -> BlockMerge:
    return in_blocks(lambda _, start, size: _Trim(cuts, start, size), merge, rooms)


def _elected(
    weights: Tensor | None, start: int, base: Tensor, trimmed: Tensor, room: Room
) -> Tensor:
    return elect(trimmed, weights)


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
        total, rooms = 0.0, Rooms()
        for name in names:
            signs = map_blocks(
                _blockwise(cuts[name], partial(_elected, self.method.weight_vector()), rooms),
                name,
                self.base[name].detach(),
                self.experts,
                coefficients_of(name, tuple(self.experts), self.method.coefficients),
                on_cores=False,
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
            size = math.prod(shape_of(self.base, name))
            room = PerThread(partial(torch.empty, min(CHUNK, size)))
            look = partial(_look, read, tuple(searches.values()), first, room)
            chunks = range(-(-size // CHUNK))
            map_on_cores(look, chunks, size=CHUNK * len(read))
            first += len(chunks)

    def _sample(self, names: list[str], task: str, stride: int) -> Iterator[Tensor]:
        for name in names:
            read = self.method.task_vector_reader(name, self.base, task, self.experts[task])
            yield read(slice(None, None, stride))


def _look(
    read: Sequence[TaskVectorReader],
    searches: Sequence[Search],
    first: int,
    room: PerThread[Tensor],
    chunk: int,
) -> None:
    part = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
    for read_one, search in zip(read, searches, strict=True):
        search.look(first + chunk, read_one(part, room.get()).abs_())


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
        trimmed = method.task_vectors(name, base, experts).flatten(1)
        trim = _Trim(cuts[name])
        for t, row in enumerate(trimmed.unbind()):
            trim(t, slice(None), row)
        signs = elect(trimmed)
        cancelled = (signs == 0) & (trimmed != 0).any(0)
        yield name, agreeing(trimmed, torch.where(cancelled, majority, signs))
