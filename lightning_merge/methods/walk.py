"""Reading one parameter of all experts: stacked whole, or in blocks that stay in the cache."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Literal, TypeAlias, final, overload

import torch
from torch import Tensor

from lightning_merge.functional.parallel import map_on_cores
from lightning_merge.states import StateDict, check_finite

BLOCK = 1 << 18
"""Entries of one parameter that an element-wise method sees at once, worth a call or a thread."""


BlockMerge: TypeAlias = Callable[[str, int, Tensor, Sequence[Tensor]], Tensor]
"""Merges a flat block: the parameter's name, the block's first entry, the base ``(n,)``, and the
block of each expert. Called from several threads."""


class SettledMerge(ABC):
    """A :data:`BlockMerge` of one parameter that settles some entries after the last block."""

    @abstractmethod
    def __call__(self, name: str, start: int, base: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """Merge one block."""

    @abstractmethod
    def settle(self, merged: Tensor) -> None:
        """Correct the merged parameter, flat, in place: now all of it has been seen."""


LINEAR_BLOCK = 1 << 22
"""Entries of a linear combination at once: worth all cores, and bound by memory in any case."""
COPIED_BLOCK = 1 << 20
"""The same where entries are copied, to multiply or to widen them: the copies stay in the cache."""


LinearMerge: TypeAlias = Callable[[Tensor, Tensor, Sequence[Tensor]], None]
"""Writes a linear combination of flat blocks into its first argument ``(n,)``, from the base and
the experts. Every NaN and infinity of what it reads shows in the result."""


RowMerge: TypeAlias = Callable[[str, Tensor, Sequence[Tensor]], Tensor]
"""Merges a parameter: its name, the base, and the value of each expert, read on access."""


def stack_parameter(
    name: str, base: Tensor, experts: Mapping[str, StateDict], coefficients: Sequence[float]
) -> Tensor:
    """Stack one parameter of all experts, their task vectors multiplied by the coefficients.

    Args:
        name: The parameter.
        base: Its pre-trained value, of any shape.
        experts: State dicts of the experts.
        coefficients: One per expert; where all are one, the experts' values are stacked as such.

    Returns:
        A new tensor of shape ``(T, *base.shape)`` on the base's device, of the experts' dtype (of
        float32 or wider where a coefficient is not one).

    Raises:
        ValueError: If a value is not finite.
    """
    values = [expert[name].detach() for expert in experts.values()]
    stacked = torch.empty((len(values), *base.shape), dtype=_common(values), device=base.device)
    for row, value in zip(stacked, values, strict=True):
        row.copy_(value)
    if not _finite(stacked) or not _finite(base):
        _check_each(name, base, values, experts)
    return scaled(base, stacked, coefficients)


def integers(
    name: str,
    base: Tensor,
    experts: Mapping[str, StateDict],
    on_mismatch: Literal["base", "first", "error"],
) -> Tensor:
    """An integer or boolean buffer of the merged model, in new memory.

    Raises:
        ValueError: If an expert's differs from the base's and that is to be an error.
    """
    if on_mismatch == "base":
        return base.clone()
    values = {task: expert[name].detach() for task, expert in experts.items()}
    differing = [
        t for t, v in values.items() if not torch.equal(v.to(base.device, base.dtype), base)
    ]
    if not differing:
        return base.clone()
    if on_mismatch == "first":
        return next(iter(values.values())).to(base.device, base.dtype, copy=True)
    raise ValueError(
        f"buffer '{name}' differs from the base's in the experts {', '.join(differing)}. Merge "
        "with on_buffer_mismatch base or first, or leave it out of the models."
    )


@final
class Rows(Sequence[Tensor]):
    """Tensors that are made when they are asked for, and not kept.

    Args:
        read: Makes the t-th of them.
        number: How many there are.
    """

    def __init__(self, read: Callable[[int], Tensor], number: int) -> None:
        self._read, self._number = read, number

    def __len__(self) -> int:
        return self._number

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self._read(t) for t in range(self._number)[index]]
        return self._read(range(self._number)[index])


def parameter_rows(
    name: str, base: Tensor, experts: Mapping[str, StateDict], coefficients: Sequence[float]
) -> Rows:
    """What :func:`stack_parameter` stacks, one expert after the other, all of them checked first.

    Safe to read from several threads.
    """
    check_finite(name, "the base", base)
    tasks = tuple(experts)
    values = [expert[name].detach() for expert in experts.values()]
    dtype = _common(values)
    for task, value in zip(tasks, values, strict=True):
        if not _finite(value):
            check_finite(name, f"expert '{task}'", value)
    del values

    def read(t: int) -> Tensor:
        value = experts[tasks[t]][name].detach().to(base.device, dtype)
        return scaled(base, value[None], coefficients[t : t + 1])[0]

    return Rows(read, len(tasks))


def map_blocks(
    function: BlockMerge,
    name: str,
    base: Tensor,
    experts: Mapping[str, StateDict],
    coefficients: Sequence[float],
    *,
    on_cores: bool,
) -> Tensor:
    """Apply an element-wise merge block by block: nothing is copied, intermediates stay in cache.

    Args:
        function: Called for every block, in any order.
        name: The parameter.
        base: Its pre-trained value, of any shape.
        experts: State dicts of the experts.
        coefficients: One per expert.
        on_cores: Merge blocks side by side, a core each: where NumPy does much of the work, which
            has one thread. Else one after the other, with all of torch's threads: the hand-over
            between Python's threads is too large a part of fast operations.

    Raises:
        ValueError: If a value is not finite.
    """
    blocks = _Blocks(name, base, experts, coefficients)

    def merge_block(start: int) -> None:
        part = slice(start, start + BLOCK)
        origin, rows = blocks.read(part)
        blocks.merged[part] = block = function(name, start, origin, rows)
        # not a single value of the experts is lost in an element-wise merge, except where weights
        # are zero, and there NaN and infinity times zero are NaN: the result shows them all
        if not _finite(block) or not _finite(origin):
            blocks.check_each()

    starts = range(0, base.numel(), BLOCK)
    if base.device.type != "cpu" or not on_cores:
        for start in starts:
            merge_block(start)
    else:
        map_on_cores(merge_block, starts, size=BLOCK)
    if isinstance(function, SettledMerge):
        function.settle(blocks.merged)
    return blocks.merged.view(base.shape)


def map_linear(
    function: LinearMerge,
    name: str,
    base: Tensor,
    experts: Mapping[str, StateDict],
    coefficients: Sequence[float],
) -> Tensor:
    """A linear combination block by block, each written in its place with all of torch's threads.

    Arguments and errors are those of :func:`map_blocks`.
    """
    blocks = _Blocks(name, base, experts, coefficients)
    size = LINEAR_BLOCK if blocks.are_direct else COPIED_BLOCK
    for start in range(0, base.numel(), size):
        part = slice(start, start + size)
        origin, rows = blocks.read(part)
        merged = blocks.written(part)
        function(merged, origin, rows)
        if not _finite(merged):
            blocks.check_each()
    return blocks.merged.view(base.shape)


class _Blocks:
    """One parameter of all models, flat, and the result."""

    def __init__(
        self,
        name: str,
        base: Tensor,
        experts: Mapping[str, StateDict],
        coefficients: Sequence[float],
    ) -> None:
        self._name, self._base, self._experts = name, base, experts
        values = [expert[name] for expert in experts.values()]
        self._values = [value.detach() if value.requires_grad else value for value in values]
        dtype = _common(self._values)
        self._rows = [_flat_as(value, base.device, dtype) for value in self._values]
        self._origin = _flat_as(base, base.device, base.dtype)
        self._plain = all(coefficient == 1.0 for coefficient in coefficients)
        self._coefficients = coefficients
        self._size = base.numel()
        self.merged = torch.empty(self._size, dtype=base.dtype, device=base.device)

    def read(self, part: slice) -> tuple[Tensor, list[Tensor]]:
        """A block of the base, and of each expert, with the coefficients applied."""
        origin, rows = self._origin, self._rows
        if part.start > 0 or part.stop < self._size:
            origin, rows = origin[part], [row[part] for row in rows]
        if not self._plain:
            rows = list(scaled(origin, torch.stack(rows), self._coefficients))
        return origin, rows

    @property
    def are_direct(self) -> bool:
        """Whether blocks are computed with as they lie in memory: one dtype of 32 bits or more."""
        dtype = self.merged.dtype
        return self._plain and dtype.itemsize >= 4 and self._rows[0].dtype == dtype

    def written(self, part: slice) -> Tensor:
        """A block of the result, to be written to."""
        return self.merged if part.start == 0 and part.stop >= self._size else self.merged[part]

    def check_each(self) -> None:
        """Raise a ``ValueError`` that names a value that is not finite, if there is one."""
        _check_each(self._name, self._base, self._values, self._experts)


def _flat_as(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    # comparisons are a tenth of what calls take where there is nothing to do, as in most biases
    if value.dtype != dtype or value.device != device:
        value = value.to(device, dtype)
    return value if value.ndim == 1 else value.reshape(-1)


def scaled(base: Tensor, experts: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Multiply the task vectors of stacked experts; all ones return the stack itself."""
    if all(coefficient == 1.0 for coefficient in coefficients):
        return experts
    dtype = torch.promote_types(experts.dtype, torch.float32)
    origin = base.to(dtype)
    factors = torch.tensor(coefficients, dtype=dtype, device=base.device)
    return origin + factors.view(-1, *[1] * base.ndim) * (experts.to(dtype) - origin)


def _common(values: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, {value.dtype for value in values})


def _finite(block: Tensor) -> bool:
    # A sum is finite only if every term is, and costs one pass with nothing written; a sum that
    # overflows although its terms are finite only leads to the exact check.
    wide = torch.promote_types(block.dtype, torch.float32)
    return math.isfinite(float(block.sum(dtype=wide)))


def _check_each(
    name: str, base: Tensor, values: Sequence[Tensor], experts: Mapping[str, StateDict]
) -> None:
    check_finite(name, "the base", base)
    for task, value in zip(experts, values, strict=True):
        check_finite(name, f"expert '{task}'", value)
