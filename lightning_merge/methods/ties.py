"""TIES: keep the largest entries, agree on a sign, merge what has it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from lightning_merge.functional.adamerging import agreeing
from lightning_merge.functional.parallel import map_on_cores
from lightning_merge.functional.selection import BLOCK as CHUNK
from lightning_merge.functional.selection import Count, Cut, largest, num_kept
from lightning_merge.functional.task_arithmetic import add_update, task_vectors_of
from lightning_merge.functional.ties import (
    BLOCK,
    Combine,
    ZeroSign,
    elect,
    sign_consensus,
    trim,
    trim_by,
)
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.checks import check_density, check_scale
from lightning_merge.methods.rules import coefficients_of
from lightning_merge.methods.walk import BlockMerge, InOrder, map_blocks
from lightning_merge.states import StateDict, shape_of


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

    def _merger_of(
        self, cuts: Sequence[tuple[float, int]], majority: Callable[[], float]
    ) -> BlockMerge:
        return _blockwise(cuts, partial(self._merge_trimmed, majority))

    def _merge_trimmed(
        self, majority: Callable[[], float], base: Tensor, trimmed: Tensor
    ) -> Tensor:
        update = sign_consensus(trimmed, self.combine, self.zero_sign, majority)
        return add_update(base, update, self.scale)


def _blockwise(
    cuts: Sequence[tuple[float, int]], merge: Callable[[Tensor, Tensor], Tensor]
) -> BlockMerge:
    """Merge trimmed blocks; in order where some of the entries that tie are kept, some not."""
    trim = _Trim(cuts)

    def merge_block(name: str, start: int, base: Tensor, rows: Sequence[Tensor]) -> Tensor:
        merged = torch.empty_like(base)
        for first in range(0, len(base), BLOCK):
            part = slice(first, first + BLOCK)
            origin = base[part]
            merged[part] = merge(origin, trim(origin, [row[part] for row in rows]))
        return merged

    return InOrder(merge_block) if any(trim.ties) else merge_block


class _Trim:
    """Trims one parameter block by block, and keeps count of the ties still to keep."""

    def __init__(self, cuts: Sequence[tuple[float, int]]) -> None:
        self.thresholds = [threshold for threshold, _ in cuts]
        self.ties = [ties for _, ties in cuts]

    def __call__(self, base: Tensor, rows: Sequence[Tensor]) -> Tensor:
        wide = torch.promote_types(torch.promote_types(base.dtype, rows[0].dtype), torch.float32)
        trimmed, origin = base.new_empty((len(rows), len(base)), dtype=wide), base.to(wide)
        for t, row in enumerate(rows):
            task_vector = torch.sub(row.to(wide), origin)
            trimmed[t], used = trim_by(task_vector, self.thresholds[t], self.ties[t])
            self.ties[t] -= used
        return trimmed


def _elected(base: Tensor, trimmed: Tensor) -> Tensor:
    return elect(trimmed)


@dataclass(frozen=True)
class _Model:
    """A base and its experts, read one parameter at a time."""

    method: TIES
    base: StateDict
    experts: Mapping[str, StateDict]

    def cuts(self, names: list[str]) -> dict[str, list[tuple[float, int]]]:
        """Threshold and ties to keep of every expert, in each of the parameters of one scope."""
        size = sum(math.prod(shape_of(self.base, name)) for name in names)
        kept = num_kept(self.method.density, size, self.method.count)

        def find(task: str) -> Cut:
            chunks = partial(self._chunks, names, task)
            return largest(chunks, size, kept, sample=partial(self._sample, names, task))

        tasks = tuple(self.experts)
        found = map_on_cores(find, tasks, size=size)
        cuts: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
        for task, cut in zip(tasks, found, strict=True):
            start = 0
            for name in names:
                stop = start + math.ceil(math.prod(shape_of(self.base, name)) / CHUNK)
                ties, tied = sum(cut.ties[start:stop]), sum(cut.tied[start:stop])
                if ties and ties == tied:
                    cuts[name].append((self._below(cut.threshold, name, task), 0))
                else:
                    cuts[name].append((cut.threshold, ties))
                start = stop
        return cuts

    def _below(self, threshold: float, name: str, task: str) -> float:
        """The next smaller number, above which lie all entries that tie as well: none to count."""
        blocks = self.method.task_vector_blocks(name, self.base, task, self.experts[task], 1)
        value = next(blocks)
        return float(torch.nextafter(torch.full_like(value, threshold), torch.zeros_like(value)))

    def majority_sign(
        self, names: list[str], cuts: Mapping[str, Sequence[tuple[float, int]]]
    ) -> float:
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

    def _chunks(self, names: list[str], task: str) -> Iterator[Tensor]:
        for name in names:
            yield from self.method.task_vector_blocks(
                name, self.base, task, self.experts[task], CHUNK
            )

    def _sample(self, names: list[str], task: str, stride: int) -> Iterator[Tensor]:
        for name in names:
            yield self.method.task_vector(name, self.base, task, self.experts[task], stride)


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
        trimmed = _Trim(cuts[name])(base[name].detach().reshape(-1), rows)
        signs = elect(trimmed)
        cancelled = (signs == 0) & (trimmed != 0).any(0)
        yield name, agreeing(trimmed, torch.where(cancelled, majority, signs))
