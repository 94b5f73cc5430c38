"""Methods that merge matrices as matrices, and give the mean of the task vectors to the rest."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_merge.functional.task_arithmetic import add_update
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.checks import check_scale
from lightning_merge.methods.low_rank import merge_low_rank_matrices
from lightning_merge.methods.matrices import Convolutions, check_split, is_matrix, merge_matrices
from lightning_merge.methods.walk import RowMerge


@dataclass(frozen=True, kw_only=True)
class MatrixMethod(WeightMethod):
    """A method with one abstract :meth:`merge_matrix`; task vectors come one at a time."""

    scale: float = 1.0
    """Coefficient λ of the update."""

    convolutions: Convolutions = "mean"
    """Average convolution kernels (the paper), or merge them as matrices (out, in * kh * kw)."""

    split: dict[str, int] = field(default_factory=dict)
    """Parts of fused matrices by pattern of names, such as 3 for '*.qkv.weight'."""

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_split(self.split)

    @abstractmethod
    def merge_matrix(self, task_vectors: Sequence[Tensor]) -> Tensor:
        """Merge the task vectors of one matrix, T of ``(m, n)``, into an update ``(m, n)``."""

    def merge_factors(self, ups: Sequence[Tensor], downs: Sequence[Tensor]) -> Tensor | None:
        """The same from factors ``(m, rank)`` and ``(rank, n)``; None: the products are needed."""
        return None

    def patterns(self) -> dict[str, Sequence[str]]:
        """See ``WeightMethod.patterns``."""
        return {**super().patterns(), "split": tuple(self.split)}

    def takes_mean(self, name: str, shape: tuple[int, ...], num_experts: int) -> bool:
        """What is no matrix."""
        return not is_matrix(shape, self.convolutions)

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter, as in ``WeightMethod.merge_tensor``."""
        return self._merge_rows(name, base, experts)

    def row_merge(self, name: str) -> RowMerge:
        """One task vector at a time; see ``WeightMethod.row_merge``."""
        return self._merge_rows

    def merge_low_rank(
        self, name: str, base: Tensor, ups: Sequence[Tensor], downs: Sequence[Tensor]
    ) -> Tensor | None:
        """From the factors alone, if :meth:`merge_factors` can; see ``WeightMethod``."""
        update = merge_low_rank_matrices(
            ups,
            downs,
            self.merge_factors,
            name=name,
            shape=tuple(base.shape),
            convolutions=self.convolutions,
            split=self.split,
        )
        return None if update is None else add_update(base, update, self.scale)

    def _merge_rows(self, name: str, base: Tensor, experts: Sequence[Tensor] | Tensor) -> Tensor:
        return merge_matrices(
            base,
            experts,
            self.merge_matrix,
            name=name,
            scale=self.scale,
            convolutions=self.convolutions,
            split=self.split,
        )
