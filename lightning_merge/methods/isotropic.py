"""IsoC and IsoCTS: the summed task vectors with a flat spectrum."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import final

from torch import Tensor

from lightning_merge.functional.isotropic import iso_c, iso_c_of_factors, iso_cts
from lightning_merge.functional.task_arithmetic import add_update
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.checks import check_range, check_scale
from lightning_merge.methods.low_rank import merge_low_rank_matrices
from lightning_merge.methods.matrices import Convolutions, check_split, is_matrix, merge_matrices
from lightning_merge.methods.walk import RowMerge


@final
@dataclass(frozen=True, kw_only=True)
class IsoC(WeightMethod):
    """Gives the sum of the task vectors of every matrix one singular value; averages the rest."""

    scale: float = 1.0
    """Coefficient λ of the update; usually tuned, the paper's lie between 0.9 and 1.5."""

    convolutions: Convolutions = "mean"
    """Average convolution kernels (the paper), or merge them as matrices (out, in * kh * kw)."""

    split: dict[str, int] = field(default_factory=dict)
    """Parts of fused matrices by pattern of names, such as 3 for '*.qkv.weight'."""

    rank_tol: float = 1e-5
    """Singular values below this fraction of the largest count as zero; 0 keeps all (the paper)."""

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_split(self.split)
        check_range("rank_tol", self.rank_tol, 0.0, 1.0)

    def takes_mean(self, name: str, shape: tuple[int, ...], num_experts: int) -> bool:
        """What is no matrix."""
        return not is_matrix(shape, self.convolutions)

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter, as in ``WeightMethod.merge_tensor``."""
        return self._merge_rows(name, base, experts)

    def row_merge(self, name: str) -> RowMerge:
        """One task vector at a time; see ``WeightMethod.row_merge``."""
        return self._merge_rows

    def _merge_rows(self, name: str, base: Tensor, experts: Sequence[Tensor] | Tensor) -> Tensor:
        return merge_matrices(
            base,
            experts,
            partial(iso_c, rank_tol=self.rank_tol),
            name=name,
            scale=self.scale,
            convolutions=self.convolutions,
            split=self.split,
        )

    def merge_low_rank(
        self, name: str, base: Tensor, ups: Sequence[Tensor], downs: Sequence[Tensor]
    ) -> Tensor | None:
        """The spectrum of the factors side by side; see ``WeightMethod.merge_low_rank``."""
        if self.rank_tol == 0:
            return None  # arbitrary directions beyond the rank: those of the dense decomposition
        update = merge_low_rank_matrices(
            ups,
            downs,
            partial(iso_c_of_factors, rank_tol=self.rank_tol),
            name=name,
            shape=tuple(base.shape),
            convolutions=self.convolutions,
            split=self.split,
        )
        return None if update is None else add_update(base, update, self.scale)


@final
@dataclass(frozen=True, kw_only=True)
class IsoCTS(WeightMethod):
    """IsoC with a part of the directions given to the single tasks."""

    scale: float = 1.0
    """Coefficient λ of the update; usually tuned, the paper's lie between 0.9 and 1.5."""

    common_fraction: float = 0.8
    """Share of the directions that are common to the tasks, in [0, 1]; 1 is IsoC."""

    convolutions: Convolutions = "mean"
    """Average convolution kernels (the paper), or merge them as matrices (out, in * kh * kw)."""

    split: dict[str, int] = field(default_factory=dict)
    """Parts of fused matrices by pattern of names, such as 3 for '*.qkv.weight'."""

    rank_tol: float = 1e-5
    """Singular values below this fraction of the largest count as zero."""

    rcond: float = 1e-6
    """Directions of the joint factors below this fraction of the largest count as duplicates."""

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_split(self.split)
        for name in ("common_fraction", "rank_tol", "rcond"):
            check_range(name, getattr(self, name), 0.0, 1.0)

    def takes_mean(self, name: str, shape: tuple[int, ...], num_experts: int) -> bool:
        """What is no matrix."""
        return not is_matrix(shape, self.convolutions)

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter, as in ``WeightMethod.merge_tensor``."""
        return self._merge_rows(name, base, experts)

    def row_merge(self, name: str) -> RowMerge:
        """One task vector at a time; see ``WeightMethod.row_merge``."""
        return self._merge_rows

    def _merge_rows(self, name: str, base: Tensor, experts: Sequence[Tensor] | Tensor) -> Tensor:
        return merge_matrices(
            base,
            experts,
            partial(
                iso_cts,
                common_fraction=self.common_fraction,
                rank_tol=self.rank_tol,
                rcond=self.rcond,
            ),
            name=name,
            scale=self.scale,
            convolutions=self.convolutions,
            split=self.split,
        )
