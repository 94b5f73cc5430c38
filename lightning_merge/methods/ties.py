"""TIES: keep the largest entries, agree on a sign, merge what has it."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from lightning_merge.functional.selection import largest, num_kept
from lightning_merge.functional.task_arithmetic import add_update, task_vectors_of
from lightning_merge.functional.ties import Combine, ZeroSign, elect, sign_consensus, trim, trim_by
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.checks import check_density, check_scale
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

    def __post_init__(self) -> None:
        check_density(self.density)
        check_scale(self.scale)

    def bind(self, base: StateDict, experts: Mapping[str, StateDict]) -> WeightMethod:
        """Find the cuts over the whole model, reading one parameter of one expert at a time."""
        if self.scope == "tensor":
            return self
        names = self.method_names(base)
        size = sum(math.prod(shape_of(base, name)) for name in names)
        kept = num_kept(self.density, size)
        cuts: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
        for task in experts:
            cut = largest(partial(self._chunks, names, base, experts, task), size, kept)
            for name, ties in zip(names, cut.ties, strict=True):
                cuts[name].append((cut.threshold, ties))

        @cache
        def majority() -> float:
            # a pass of its own, only if task vectors cancel somewhere: rare in real weights
            signs = (
                elect(_trimmed(self.task_vectors(name, base, experts), cuts[name]))
                for name in names
            )
            return float(np.sign(sum(float(sign.sum(dtype=torch.float64)) for sign in signs)))

        def merge_tensor(name: str, value: Tensor, stacked: Tensor) -> Tensor:
            trimmed = _trimmed(task_vectors_of(value, stacked), cuts[name])
            return self._add(value, trimmed, majority)

        return self.bound_to(merge_tensor)

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter, trimmed on its own: the scope ``tensor``."""
        return self._add(base, trim(task_vectors_of(base, experts), self.density))

    def _add(
        self, base: Tensor, trimmed: Tensor, majority: Callable[[], float] | None = None
    ) -> Tensor:
        update = sign_consensus(trimmed, self.combine, self.zero_sign, majority)
        return add_update(base, update, self.scale)

    def _chunks(
        self, names: list[str], base: StateDict, experts: Mapping[str, StateDict], task: str
    ) -> Iterator[Tensor]:
        for name in names:
            yield self.task_vectors(name, base, {task: experts[task]}).reshape(-1)


def _trimmed(task_vectors: Tensor, cuts: list[tuple[float, int]]) -> Tensor:
    rows = zip(task_vectors, cuts, strict=True)
    return torch.stack([trim_by(row, threshold, ties) for row, (threshold, ties) in rows])
