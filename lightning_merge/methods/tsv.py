"""TSVMerge: the leading singular directions of all tasks, made orthogonal."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from lightning_merge.functional.lora import lora_factors, sum_of_products
from lightning_merge.functional.task_arithmetic import summed
from lightning_merge.functional.tsv import energy_rank, merge_factors, tsv_merge
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.checks import check_range
from lightning_merge.methods.matrices import is_matrix, parts_of, warn_of_capped, warn_of_small
from lightning_merge.methods.matrix_method import MatrixMethod
from lightning_merge.states import StateDict, shape_of


@final
@dataclass(frozen=True, kw_only=True)
class TSVMerge(MatrixMethod):
    """Merges task singular vectors: low-rank updates whose directions are made orthogonal."""

    side_by_side: ClassVar[bool] = True

    scale: float = 1.0
    """Coefficient λ of the merged update; 1.0 needs no tuning, the paper tunes it in 0.1 to 3."""

    rank: int | None = None
    """Directions kept of each task and matrix, at most the paper's min(m, n) // T; null: that."""

    rank_fraction: float | None = None
    """Or as a fraction of min(m, n), at most 1 / T."""

    energy: float = 1.0
    """Keep fewer where this share of a task vector's squared norm is reached, in (0, 1]."""

    rank_tol: float = 1e-5
    """Directions below this fraction of a task vector's largest singular value are noise."""

    rcond: float = 1e-6
    """Directions of the joint factors below this fraction of the largest count as duplicates."""

    shrinkage: float = 0.0
    """Softens the whitening of near-duplicate tasks; 0 is the paper's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.rank_fraction is not None:
            raise ValueError("give rank or rank_fraction, not both.")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, found {self.rank}.")
        for name in ("energy", "rank_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must lie in (0, 1], found {value}.")
        for name in ("rank_tol", "rcond"):
            check_range(name, getattr(self, name), 0.0, 1.0)
        check_range("shrinkage", self.shrinkage, 0.0, math.inf)

    def bind(self, base: StateDict, experts: Mapping[str, StateDict]) -> WeightMethod:
        """Warn of a rank that does not fit, and of matrices too small for any."""
        if self.rank_fraction is not None and self.rank_fraction * len(experts) > 1 + 1e-9:
            warnings.warn(
                f"TSVMerge: rank_fraction {self.rank_fraction:g} times {len(experts)} experts is "
                "more than the directions of a matrix; using 1 / T.",
                stacklevel=3,
            )
        sides = {
            name: self._smaller_side(name, shape_of(base, name))
            for name in self.method_names(base)
            if is_matrix(shape_of(base, name), self.convolutions)
        }
        if self.rank is not None:
            most = {name: side // len(experts) for name, side in sides.items()}
            warn_of_capped([n for n, m in most.items() if 0 < m < self.rank], self.rank, "TSVMerge")
        small = [name for name, side in sides.items() if side < len(experts)]
        warn_of_small(small, len(experts), "TSVMerge")
        return self

    def takes_mean(self, name: str, shape: tuple[int, ...], num_experts: int) -> bool:
        """What is no matrix, or too small for a direction of every expert."""
        small = self._smaller_side(name, shape) if is_matrix(shape, self.convolutions) else 0
        return self.rank_of(small, num_experts) == 0

    def merge_factors(self, ups: Sequence[Tensor], downs: Sequence[Tensor]) -> Tensor:
        """Triplets by the QR route."""
        size = min(len(ups[0]), downs[0].shape[1])
        rank = self.rank_of(size, len(ups))
        if rank == 0:
            return sum_of_products(ups, downs, [1 / len(ups)] * len(ups))
        if len(ups) == 1 and rank == size and self.energy >= 1:
            return ups[0].double() @ downs[0].double()
        factors = []
        for up, down in zip(ups, downs, strict=True):
            whole = lora_factors(up, down, self.rank_tol)
            total = float(whole.values.square().sum())
            kept = energy_rank(whole.values, total, self.energy) if self.energy < 1 else rank
            factors.append(whole.truncated(min(rank, kept)))
        return merge_factors(factors, rcond=self.rcond, shrinkage=self.shrinkage)

    def merge_matrix(self, task_vectors: Sequence[Tensor]) -> Tensor:
        """As in ``MatrixMethod.merge_matrix``."""
        rank = self.rank_of(min(task_vectors[0].shape), len(task_vectors))
        if rank == 0:
            return summed(task_vectors) / len(task_vectors)
        return tsv_merge(
            task_vectors,
            rank,
            energy=self.energy,
            rank_tol=self.rank_tol,
            rcond=self.rcond,
            shrinkage=self.shrinkage,
        )

    def rank_of(self, size: int, num_experts: int) -> int:
        """Directions kept of each task in a matrix whose smaller side is ``size``."""
        # integers throughout: int(49 * (1 / 49)) is 0
        most = size // num_experts
        if self.rank is not None:
            return min(self.rank, most)
        if self.rank_fraction is not None:
            return min(max(1, int(size * self.rank_fraction)), most)
        return most

    def _smaller_side(self, name: str, shape: tuple[int, ...]) -> int:
        return min(shape[0] // parts_of(name, self.split), math.prod(shape[1:]))
