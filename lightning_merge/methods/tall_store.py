"""TALLCompress: all experts as one vector and a mask each, any of them rebuilt on demand."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from lightning_merge.functional.tall import pack_mask, tall_masks, unpack_mask
from lightning_merge.functional.task_arithmetic import task_vectors_of
from lightning_merge.methods.stored import ExpertStore, StoredExperts, is_statistic, whole_entries
from lightning_merge.methods.walk import stack_parameter
from lightning_merge.states import StateDict, check_compatible, tied_names


@final
@dataclass(frozen=True, kw_only=True)
class TALLCompress(ExpertStore):
    """Keeps of all experts the sum of their task vectors, and of each a mask (arXiv:2405.07813).

    The file is as large as the base, in whose dtype the sum is, plus a bit for each of its entries
    and each task.
    """

    threshold: float = 0.4
    """κ of every task's mask, at least 0: larger is sparser; the paper tunes it in 0.2 to 0.6."""

    thresholds: dict[str, float] = field(default_factory=dict)
    """κ of single tasks, instead of ``threshold``."""

    buffers: tuple[str, ...] = ()
    """Shell patterns of floating buffers, stored whole as running_mean and running_var are."""

    def __post_init__(self) -> None:
        for kappa in (self.threshold, *self.thresholds.values()):
            if not (kappa >= 0 and math.isfinite(kappa)):
                raise ValueError(f"thresholds must be finite and at least 0, found {kappa}.")

    def save(
        self, path: str | Path, base: StateDict, experts: Mapping[str, StateDict]
    ) -> "MaskedExperts":
        """Write the vector and the masks into one safetensors file and open it.

        Integers and running statistics are stored whole for every task: a masked sum of variances
        could be negative. Names that the base ties are stored once.

        Raises:
            ValueError: If the experts do not fit the base, a value is not finite, or a threshold
                names an unknown task.
        """
        check_compatible(base, experts)
        if unknown := [task for task in self.thresholds if task not in experts]:
            raise ValueError(
                f"thresholds name unknown tasks: {', '.join(unknown)}; "
                f"the experts are {', '.join(experts)}."
            )
        kappa = torch.tensor([self.thresholds.get(task, self.threshold) for task in experts])
        tensors: dict[str, Tensor] = {}
        ties = tied_names(base)
        for name in (name for name in base if name not in ties):
            if is_statistic(name, base, self.buffers):
                tensors |= whole_entries(name, base, experts)
                continue
            origin = base[name].detach()
            stacked = stack_parameter(name, origin, experts, [1.0] * len(experts))
            vectors = task_vectors_of(origin, stacked)
            total = vectors.sum(dim=0)
            # rounded as the base is, it loses less than the rebuilt expert's own rounding does
            tensors[f"sum/{name}"] = total.to(origin.dtype)
            masks = tall_masks(vectors, total, kappa)
            tensors |= {f"{i}/mask/{name}": pack_mask(mask) for i, mask in enumerate(masks)}
        MaskedExperts.write(path, tensors, base, experts)
        return MaskedExperts(path)


@final
class MaskedExperts(StoredExperts):
    r"""A file that :class:`TALLCompress` wrote: :math:`\theta_0 + m_t \circ \sum_s \tau_s`."""

    KIND = "masked experts"
    WRITER = "TALLCompress"

    def density(self, task: str) -> float:
        """Share of the vector's entries that the task's mask keeps."""
        index = self.index(task)
        kept = size = 0
        for key in self._file:
            if key.startswith("sum/"):
                shape = self._file.shape(key)
                mask = self._file[f"{index}/mask/{key.removeprefix('sum/')}"]
                kept += int(unpack_mask(mask, shape).sum())
                size += math.prod(shape)
        return kept / max(1, size)

    def _rebuild(self, index: int, name: str, base: Tensor) -> Tensor:
        if f"sum/{name}" not in self._file or self._file.shape(f"sum/{name}") != base.shape:
            raise ValueError(
                f"{self._file.path}: no parameter '{name}' of shape {tuple(base.shape)}. Rebuild "
                "with the base it was made from."
            )
        dtype = torch.promote_types(base.dtype, torch.float32)
        total = self._file[f"sum/{name}"].to(dtype)
        mask = unpack_mask(self._file[f"{index}/mask/{name}"], tuple(base.shape))
        update = torch.where(mask, total, 0.0).to(base.device)
        return (base.to(dtype) + update).to(base.dtype)
