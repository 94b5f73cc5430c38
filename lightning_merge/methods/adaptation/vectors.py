"""Task vectors, kept or read anew, combined and contracted block by block."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_merge.functional.adamerging import combination, contraction
from lightning_merge.functional.task_arithmetic import task_vectors_of
from lightning_merge.methods.walk import BLOCK
from lightning_merge.states import StateDict, check_finite

Storage: TypeAlias = Literal["exact", "bfloat16", "float16", "stream"]
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def plain_task_vectors(
    base: StateDict, experts: Mapping[str, StateDict], names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """Task vectors of each parameter, flat, of shape ``(K, n)`` in float32 or wider.

    Raises:
        ValueError: If a value is not finite.
    """
    for name in names:
        yield name, torch.stack(list(_differences(name, base, experts)))


def _differences(name: str, base: StateDict, experts: Mapping[str, StateDict]) -> Iterator[Tensor]:
    origin = base[name].detach().reshape(-1)
    for task, expert in experts.items():
        value = expert[name].detach().reshape(-1).to(origin.device)
        vector = task_vectors_of(origin, value[None])[0]
        if not math.isfinite(float(vector.sum())):
            check_finite(name, "the base", origin)
            check_finite(name, f"expert '{task}'", value)
        yield vector


class KeptVectors:
    """Task vectors in memory: exactly, or in half the bytes.

    float16 entries are relative to each task vector's largest one, so that none overflows and few
    underflow.

    Args:
        vectors: By name, ``(K, n)`` each; a generator is stored one parameter at a time.
        storage: How they are kept.
        device: Where.
    """

    def __init__(
        self, vectors: Iterable[tuple[str, Tensor]], storage: Storage, device: torch.device
    ) -> None:
        self._rows: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        for name, rows in vectors:
            if storage == "float16":
                largest = [float(row.abs().max()) if row.numel() else 0.0 for row in rows]
                scale = rows.new_tensor([[value or 1.0] for value in largest])
                self._scales[name] = scale.to(device)
                rows = rows / scale
            self._rows[name] = rows.to(HALVES.get(storage, rows.dtype)).to(device)

    def block(self, name: str, rows: slice) -> Tensor:
        """Some entries of the task vectors of one parameter, ``(K, b)``, in float32 or wider."""
        block = self._rows[name][:, rows]
        block = block.to(torch.promote_types(block.dtype, torch.float32))
        return block * self._scales[name] if name in self._scales else block


class StreamedVectors:
    """Task vectors read anew at every look: nothing is kept beyond what the mappings keep.

    Args:
        base: The pre-trained weights.
        experts: Fine-tuned weights by task, best read lazily from files.
        device: Where they are wanted.
    """

    def __init__(
        self, base: StateDict, experts: Mapping[str, StateDict], device: torch.device
    ) -> None:
        self._base, self._experts, self._device = base, experts, device
        self._read: tuple[str, Tensor, list[Tensor]] | None = None

    def block(self, name: str, rows: slice) -> Tensor:
        """As :meth:`KeptVectors.block`; the parameter that was asked for last is not read again."""
        if self._read is None or self._read[0] != name:
            values = [expert[name].detach().reshape(-1) for expert in self._experts.values()]
            self._read = name, self._base[name].detach().reshape(-1), values
        origin = self._read[1][rows].to(self._device)
        parts = [value[rows].to(origin) for value in self._read[2]]
        return torch.stack([task_vectors_of(origin, part[None])[0] for part in parts])


Vectors: TypeAlias = KeptVectors | StreamedVectors


@torch.no_grad()
def combine_into(
    target: Tensor, name: str, origin: Tensor, vectors: Vectors, coefficients: Tensor
) -> None:
    """Write ``origin + sum of coefficients x task vectors`` into a tensor, block by block.

    Args:
        target: Where to, of any shape and floating dtype.
        name: The parameter.
        origin: What the task vectors are added to, of the same shape.
        vectors: Task vectors.
        coefficients: ``(K,)`` float64.
    """
    flat_origin = origin.detach().reshape(-1)
    flat = target.view(-1) if target.is_contiguous() else target.new_empty(target.numel())
    for rows in _blocks(flat):
        block = vectors.block(name, rows)
        flat[rows] = combination(flat_origin[rows].to(block), block, coefficients).to(flat.dtype)
    if not target.is_contiguous():
        target.copy_(flat.view(target.shape))


@torch.no_grad()
def contract(name: str, gradient: Tensor, vectors: Vectors) -> Tensor:
    """Inner products ``(K,)`` in float64, on the CPU, of a gradient with the task vectors."""
    flat = gradient.reshape(-1)
    found = [contraction(flat[rows], vectors.block(name, rows)).cpu() for rows in _blocks(flat)]
    return torch.stack(found).sum(0)


def _blocks(flat: Tensor) -> list[slice]:
    # on the CPU a block and its task vectors stay in the cache; elsewhere launches cost more
    size = BLOCK if flat.device.type == "cpu" else max(1, len(flat))
    return [
        slice(start, min(start + size, len(flat))) for start in range(0, max(1, len(flat)), size)
    ]
