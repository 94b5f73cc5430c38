"""Reading one parameter of all experts: stacked whole, or in blocks that stay in the cache."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_merge.states import StateDict, check_finite

BLOCK = 1 << 17
"""Entries of one parameter that an element-wise method sees at once: eight experts fit in L3."""


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
    values = [expert[name] for expert in experts.values()]
    stacked = torch.empty((len(values), *base.shape), dtype=_common(values), device=base.device)
    for row, value in zip(stacked, values, strict=True):
        row.copy_(value)
    _check_all_finite(name, base, stacked, values, experts)
    return scaled(base, stacked, coefficients)


def blocks(
    name: str, base: Tensor, experts: Mapping[str, StateDict], coefficients: Sequence[float]
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield a parameter in blocks: its slice, the base ``(n,)`` and the experts ``(T, n)``.

    The blocks follow the flat order of entries. The experts' block is overwritten by the next one;
    arguments and errors as in :func:`stack_parameter`.
    """
    values = [expert[name] for expert in experts.values()]
    flat = [value.reshape(-1) for value in values]
    flat_base = base.reshape(-1)
    width = min(BLOCK, len(flat_base))
    scratch = torch.empty((len(values), width), dtype=_common(values), device=base.device)
    for start in range(0, len(flat_base), BLOCK):
        part = slice(start, min(start + BLOCK, len(flat_base)))
        block = scratch[:, : part.stop - part.start]
        for row, value in zip(block, flat, strict=True):
            row.copy_(value[part])
        _check_all_finite(name, flat_base[part], block, values, experts)
        yield part, flat_base[part], scaled(flat_base[part], block, coefficients)


def map_blocks(
    function: Callable[[str, Tensor, Tensor], Tensor],
    name: str,
    base: Tensor,
    experts: Mapping[str, StateDict],
    coefficients: Sequence[float],
) -> Tensor:
    """Apply an element-wise merge block by block; the same values as on the whole stack."""
    merged = torch.empty(base.numel(), dtype=base.dtype, device=base.device)
    for part, origin, block in blocks(name, base, experts, coefficients):
        merged[part] = function(name, origin, block)
    return merged.view(base.shape)


def scaled(base: Tensor, experts: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Multiply the task vectors of stacked experts; all ones return the stack itself."""
    if all(coefficient == 1.0 for coefficient in coefficients):
        return experts
    dtype = torch.promote_types(experts.dtype, torch.float32)
    origin = base.to(dtype)
    factors = torch.tensor(coefficients, dtype=dtype, device=base.device)
    return origin + factors.view(-1, *[1] * base.ndim) * (experts.to(dtype) - origin)


def _common(values: Sequence[Tensor]) -> torch.dtype:
    dtype = values[0].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    return dtype


def _check_all_finite(
    name: str,
    base: Tensor,
    block: Tensor,
    values: Sequence[Tensor],
    experts: Mapping[str, StateDict],
) -> None:
    # A sum is finite only if every term is, and costs one pass with nothing written; a sum that
    # overflows although its terms are finite only leads to the exact check.
    wide = torch.promote_types(block.dtype, torch.float32)
    if bool(torch.isfinite(block.sum(dtype=wide) + base.sum(dtype=wide))):
        return
    check_finite(name, "the base", base)
    for task, value in zip(experts, values, strict=True):
        check_finite(name, f"expert '{task}'", value)
