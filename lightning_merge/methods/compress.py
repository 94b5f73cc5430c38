"""TSVCompress: all experts as low-rank updates in one file, any of them rebuilt on demand."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from lightning_merge.functional.spectral import leading_triplets
from lightning_merge.functional.task_arithmetic import task_vectors_of
from lightning_merge.methods.matrices import Convolutions, is_matrix
from lightning_merge.methods.stored import StoredExperts
from lightning_merge.states import StateDict, check_compatible, check_finite


@final
@dataclass(frozen=True, kw_only=True)
class TSVCompress:
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

        A matrix is stored by factors where they are smaller, everything else as it is.

        Raises:
            ValueError: If the experts do not fit the base, or a value is not finite.
        """
        check_compatible(base, experts)
        tensors: dict[str, Tensor] = {}
        for name in base:
            for index, (task, expert) in enumerate(experts.items()):
                check_finite(name, f"expert '{task}'", expert[name])
                parts = self._parts(base[name].detach(), expert[name].detach(), len(experts))
                tensors |= {f"{index}/{part}/{name}": value for part, value in parts.items()}
        CompressedExperts.write(path, tensors, experts)
        return CompressedExperts(path)

    def _parts(self, base: Tensor, expert: Tensor, num_experts: int) -> dict[str, Tensor]:
        if not base.is_floating_point() or not is_matrix(base.shape, self.convolutions):
            return {"whole": expert.clone()}
        update = task_vectors_of(base, expert[None])[0].flatten(1)
        size = min(update.shape)
        rank = min(size, self.rank or max(1, size // num_experts))
        if rank * (sum(update.shape) + 1) >= update.numel():
            return {"whole": expert.clone()}
        factors = leading_triplets(update, rank)
        return {part: value.to(base.dtype) for part, value in factors._asdict().items()}


@final
class CompressedExperts(StoredExperts):
    """A file that :class:`TSVCompress` wrote.

    The squared error of a matrix is the sum of the squares of the singular values that were left
    out (Eckart and Young), up to rounding.
    """

    KIND = "compressed experts"
    WRITER = "TSVCompress"

    def _rebuild(self, index: int, name: str, base: Tensor) -> Tensor:
        if f"{index}/whole/{name}" in self._file:
            return self._file[f"{index}/whole/{name}"].clone()
        parts = [f"{index}/{part}/{name}" for part in ("left", "values", "right")]
        if parts[0] not in self._file:
            raise ValueError(
                f"{self._file.path}: no parameter '{name}'. Rebuild with the base it was made from."
            )
        dtype = torch.promote_types(base.dtype, torch.float32)
        left, values, right = (self._file[part].to(base.device, dtype) for part in parts)
        update = (left * values) @ right
        if update.numel() != base.numel():
            raise ValueError(
                f"{self._file.path}: '{name}' has {update.numel()} entries, the base has "
                f"{base.numel()}. Rebuild with the base it was made from."
            )
        return (base.to(dtype) + update.view(base.shape)).to(base.dtype)
