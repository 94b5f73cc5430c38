"""TSVCompress: all experts as low-rank updates in one file, any of them rebuilt on demand."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from lightning_merge.functional.spectral import leading_triplets
from lightning_merge.functional.task_arithmetic import task_vectors_of
from lightning_merge.methods.matrices import Convolutions, is_matrix
from lightning_merge.methods.stored import ExpertStore, StoredExperts, is_statistic, whole_entries
from lightning_merge.methods.walk import parameter_rows
from lightning_merge.states import StateDict, check_compatible, shape_of, tied_names


@final
@dataclass(frozen=True, kw_only=True)
class TSVCompress(ExpertStore):
    """Keeps of every expert the leading singular triplets of its updates (arXiv:2412.00081).

    With the paper's rank, the factors of all tasks together are about as large as the base.
    """

    rank: int | None = None
    """Triplets kept of each task and matrix; null: min(m, n) // T, and at least one."""

    convolutions: Convolutions = "matrix"
    """Compress kernels as matrices too, or store them whole (``mean``, as the paper does)."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, found {self.rank}.")

    def save(
        self, path: str | Path, base: StateDict, experts: Mapping[str, StateDict]
    ) -> "CompressedExperts":
        """Compress the experts into one safetensors file and open it.

        A matrix is stored by factors where they are smaller, everything else as it is, all in the
        base's dtype. Names that the base ties are stored once.

        Raises:
            ValueError: If the experts do not fit the base, or a value is not finite.
        """
        check_compatible(base, experts)
        tensors: dict[str, Tensor] = {}
        ties = tied_names(base)
        for name in (name for name in base if name not in ties):
            rank = self._rank(name, base, len(experts))
            if rank == 0:
                tensors |= whole_entries(name, base, experts)
                continue
            origin = base[name].detach()
            for index, vector in enumerate(_matrices(name, origin, experts)):
                parts = leading_triplets(vector, rank)._asdict()
                tensors |= {f"{index}/{k}/{name}": v.to(origin.dtype) for k, v in parts.items()}
        CompressedExperts.write(path, tensors, base, experts)
        return CompressedExperts(path)

    def _rank(self, name: str, base: StateDict, num_experts: int) -> int:
        """Triplets to keep of one parameter; 0: it is stored whole."""
        shape = shape_of(base, name)
        if is_statistic(name, base) or not is_matrix(shape, self.convolutions):
            return 0
        rows, columns = _matrix_shape(shape)
        size = min(rows, columns)
        rank = min(size, self.rank or max(1, size // num_experts))
        return 0 if rank * (rows + columns + 1) >= rows * columns else rank


def _matrices(name: str, base: Tensor, experts: Mapping[str, StateDict]) -> Iterator[Tensor]:
    """Task vectors of one parameter as matrices, one by one, in float32 or wider."""
    for row in parameter_rows(name, base, experts, [1.0] * len(experts)):
        yield task_vectors_of(base, row[None])[0].flatten(1)


@final
class CompressedExperts(StoredExperts):
    """A file that :class:`TSVCompress` wrote.

    The squared error of a matrix is the sum of the squares of the singular values that were left
    out (Eckart and Young), up to rounding.
    """

    KIND = "compressed experts"
    WRITER = "TSVCompress"

    def _rebuild(self, index: int, name: str, base: Tensor) -> Tensor:
        parts = [f"{index}/{part}/{name}" for part in ("left", "values", "right")]
        if parts[0] not in self._file:
            raise ValueError(
                f"{self._file.path}: no parameter '{name}'. Rebuild with the base it was made from."
            )
        dtype = torch.promote_types(base.dtype, torch.float32)
        left, values, right = (self._file[part].to(base.device, dtype) for part in parts)
        if (len(left), right.shape[1]) != _matrix_shape(base.shape):
            raise ValueError(
                f"{self._file.path}: '{name}' is a matrix {len(left)} x {right.shape[1]}, the base "
                f"has shape {tuple(base.shape)}. Rebuild with the base it was made from."
            )
        update = (left * values) @ right
        return (base.to(dtype) + update.view(base.shape)).to(base.dtype)


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Of a parameter as a matrix, ``(out, in * kh * kw)`` for a kernel."""
    return (shape[0] if shape else 1), math.prod(shape[1:])
