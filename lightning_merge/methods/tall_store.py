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
from lightning_merge.methods.stored import StoredExperts
from lightning_merge.methods.walk import stack_parameter
from lightning_merge.states import (
    STATISTIC_SUFFIXES,
    StateDict,
    check_compatible,
    kind_of,
)


@final
@dataclass(frozen=True, kw_only=True)
class TALLCompress:
    """Keeps of all experts the sum of their task vectors, and of each a mask (arXiv:2405.07813).

    The file is as large as one expert, plus a bit for each of its entries and each task.
    """

    threshold: float = 0.4
    """κ of every task's mask, at least 0: larger is sparser; the paper tunes it in 0.2 to 0.6."""

    thresholds: dict[str, float] = field(default_factory=dict)
    """κ of single tasks, instead of ``threshold``."""

    def __post_init__(self) -> None:
        for kappa in (self.threshold, *self.thresholds.values()):
            if not (kappa >= 0 and math.isfinite(kappa)):
                raise ValueError(f"thresholds must be finite and at least 0, found {kappa}.")

    def save(
        self, path: str | Path, base: StateDict, experts: Mapping[str, StateDict]
    ) -> "MaskedExperts":
        """Write the vector and the masks into one safetensors file and open it.

        Integers and running statistics are stored whole for every task: a masked sum of variances
        could be negative.

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
        for name in base:
            if _is_whole(base, name):
                rows = (expert[name].detach().clone() for expert in experts.values())
                tensors |= {f"{i}/whole/{name}": value for i, value in enumerate(rows)}
                continue
            origin = base[name].detach()
            stacked = stack_parameter(name, origin, experts, [1.0] * len(experts))
            vectors = task_vectors_of(origin, stacked)
            total = vectors.sum(dim=0)
            tensors[f"sum/{name}"] = total
            masks = tall_masks(vectors, total, kappa)
            tensors |= {f"{i}/mask/{name}": pack_mask(mask) for i, mask in enumerate(masks)}
        MaskedExperts.write(path, tensors, experts)
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
        if f"{index}/whole/{name}" in self._file:
            return self._file[f"{index}/whole/{name}"].clone()
        if f"sum/{name}" not in self._file or self._file.shape(f"sum/{name}") != base.shape:
            raise ValueError(
                f"{self._file.path}: no parameter '{name}' of shape {tuple(base.shape)}. Rebuild "
                "with the base it was made from."
            )
        total = self._file[f"sum/{name}"]
        mask = unpack_mask(self._file[f"{index}/mask/{name}"], tuple(base.shape))
        update = torch.where(mask, total, 0.0).to(base.device)
        return (base.to(update.dtype) + update).to(base.dtype)


def _is_whole(base: StateDict, name: str) -> bool:
    statistic = name.rpartition(".")[2] in STATISTIC_SUFFIXES
    return statistic or kind_of(base, name) != "floating"
