"""Experts that are the base plus low-rank updates: their factors, and merging with them."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_merge.functional.lora import sum_of_products
from lightning_merge.methods.matrices import Convolutions, is_matrix, parts_of
from lightning_merge.states import StateDict, check_finite

LowRankMerge: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor | None]
"""Merges the factors of one matrix into its update."""

FactorsOf: TypeAlias = Callable[[str], tuple[Tensor, Tensor] | None]
"""Method ``factors`` of an expert that gives its updates as such, as a LoRA adapter does:
``(out, rank)`` and ``(rank, in)`` of one parameter's update, or None where it has no such."""


def low_rank_factors(
    name: str, base: Tensor, experts: Mapping[str, StateDict], coefficients: Sequence[float]
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Factors of the task vectors of one parameter, if every expert has them.

    Args:
        name: The parameter.
        base: Its pre-trained value.
        experts: State dicts of the experts.
        coefficients: One per expert; the left factors are multiplied by them.

    Raises:
        ValueError: If a value is not finite.
    """
    ups, downs = [], []
    for (task, expert), coefficient in zip(experts.items(), coefficients, strict=True):
        factors_of: FactorsOf | None = getattr(expert, "factors", None)
        factors = factors_of(name) if factors_of else None
        if factors is None:
            return None
        for factor in factors:
            check_finite(name, f"expert '{task}'", factor)
        ups.append(factors[0].to(base.device) * coefficient)
        downs.append(factors[1].to(base.device))
    check_finite(name, "the base", base)
    return ups, downs


def merge_low_rank_matrices(
    ups: Sequence[Tensor],
    downs: Sequence[Tensor],
    merge: LowRankMerge,
    *,
    name: str,
    shape: tuple[int, ...],
    convolutions: Convolutions,
    split: Mapping[str, int],
) -> Tensor | None:
    """Merge factors as matrices, and by the mean where they are none.

    The twin of :func:`lightning_merge.methods.matrices.merge_matrices`; None: it must do it.
    """
    if not is_matrix(shape, convolutions):
        return sum_of_products(ups, downs, [1 / len(ups)] * len(ups)).view(shape)
    parts = parts_of(name, split)
    if shape[0] % parts:
        return None  # the dense route says what is wrong
    rows = zip(*(up.chunk(parts) for up in ups), strict=True)
    merged = [merge(part, downs) for part in rows]
    found = [update for update in merged if update is not None]
    return torch.cat(found).view(shape) if len(found) == parts else None
