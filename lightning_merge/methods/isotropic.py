"""IsoC and IsoCTS: the summed task vectors with a flat spectrum."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from lightning_merge.functional.isotropic import (
    iso_c,
    iso_c_of_factors,
    iso_cts,
    iso_cts_of_factors,
)
from lightning_merge.methods.checks import check_range
from lightning_merge.methods.matrix_method import MatrixMethod


@final
@dataclass(frozen=True, kw_only=True)
class IsoC(MatrixMethod):
    """Gives the sum of the task vectors of every matrix one singular value; averages the rest."""

    side_by_side: ClassVar[bool] = True

    scale: float = 1.0
    """Coefficient λ of the update; usually tuned, the paper's lie between 0.9 and 1.5."""

    rank_tol: float = 1e-5
    """Singular values below this fraction of the largest count as zero; 0 keeps all (the paper)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("rank_tol", self.rank_tol, 0.0, 1.0)

    def merge_matrix(self, task_vectors: Sequence[Tensor]) -> Tensor:
        """As in ``MatrixMethod.merge_matrix``."""
        return iso_c(task_vectors, rank_tol=self.rank_tol)

    def merge_factors(self, ups: Sequence[Tensor], downs: Sequence[Tensor]) -> Tensor | None:
        """The spectrum of the factors side by side."""
        if self.rank_tol == 0:
            return None  # arbitrary directions beyond the rank: those of the dense decomposition
        return iso_c_of_factors(ups, downs, rank_tol=self.rank_tol)


@final
@dataclass(frozen=True, kw_only=True)
class IsoCTS(MatrixMethod):
    """IsoC with a part of the directions given to the single tasks."""

    side_by_side: ClassVar[bool] = True

    scale: float = 1.0
    """Coefficient λ of the update; usually tuned, the paper's lie between 0.9 and 1.5."""

    common_fraction: float = 0.8
    """Share of the directions that are common to the tasks, in [0, 1]; 1 is IsoC."""

    rank_tol: float = 1e-5
    """Singular values below this fraction of the largest count as zero."""

    rcond: float = 1e-6
    """Directions of the joint factors below this fraction of the largest count as duplicates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("common_fraction", "rank_tol", "rcond"):
            check_range(name, getattr(self, name), 0.0, 1.0)

    def merge_matrix(self, task_vectors: Sequence[Tensor]) -> Tensor:
        """As in ``MatrixMethod.merge_matrix``."""
        return iso_cts(
            task_vectors,
            common_fraction=self.common_fraction,
            rank_tol=self.rank_tol,
            rcond=self.rcond,
        )

    def merge_factors(self, ups: Sequence[Tensor], downs: Sequence[Tensor]) -> Tensor | None:
        """The sum, the rest outside the common space and the whitening, all by factors."""
        if self.rank_tol == 0:
            return None  # arbitrary directions beyond the rank: those of the dense decomposition
        return iso_cts_of_factors(
            ups,
            downs,
            self.common_fraction,
            rank_tol=self.rank_tol,
            rcond=self.rcond,
        )
