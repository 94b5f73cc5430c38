"""Exact order statistics of a vector that is too long to hold: one pass with a sampled bracket."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

SAMPLE = 1 << 18
"""Sampled magnitudes: the bracket of six standard errors then holds about 0.6 % of the entries."""


@final
@dataclass(frozen=True)
class Cut:
    """The entries of a long vector with the largest magnitudes, exactly as many as asked for.

    Kept is what lies above ``threshold``, and of the entries at the threshold those first in flat
    order: ``ties[i]`` of them in the i-th chunk.
    """

    threshold: float
    ties: tuple[int, ...]


def num_kept(density: float, size: int) -> int:
    """Entries kept of ``size``: the rounded share, and at least one.

    Example:
        >>> num_kept(0.2, 10), num_kept(0.2, 2), num_kept(1.0, 3), num_kept(0.5, 0)
        (2, 1, 3, 0)
    """
    return min(size, max(1, round(density * size)))


def largest(chunks: Callable[[], Iterable[Float[Tensor, " n"]]], size: int, kept: int) -> Cut:
    """Find the ``kept`` entries of largest magnitude of a vector given in chunks.

    The chunks are read once for a sample and once to count; a bracket that misses (it never does
    for vectors in random order, see :data:`SAMPLE`) is widened and counted again, so the result is
    always exact. Memory follows the entries inside the bracket.

    Args:
        chunks: Gives the vector's chunks in flat order, the same ones at every call.
        size: Entries of the whole vector.
        kept: How many to keep, from 0 to ``size``. Zero keeps nothing (an infinite threshold).
    """
    if not 0 <= kept <= size:
        raise ValueError(f"kept must lie in [0, {size}], found {kept}.")
    if kept == 0:
        return Cut(float("inf"), tuple(0 for _ in chunks()))
    low, high = _bracket(_sample(chunks(), size), kept / size)
    while True:
        count = _count(chunks(), low, high)
        if count.above >= kept:
            low, high = high, float("inf")  # the threshold lies above the bracket
        elif count.total < kept:
            low, high = -1.0, low  # or below it
        else:
            return _cut(count, kept)


@dataclass
class _Count:
    """How a vector lies around the bracket: what is inside, and what equals its ends, by chunk.

    The ends are counted apart, since one value (zero, most often) may fill much of the vector.
    """

    low: float
    high: float
    above: int
    at_high: list[int]
    inside: list[Tensor]
    at_low: list[int]

    @property
    def total(self) -> int:
        """Entries not below the bracket."""
        inside = sum(len(chunk) for chunk in self.inside)
        return self.above + sum(self.at_high) + inside + sum(self.at_low)


def _count(chunks: Iterable[Tensor], low: float, high: float) -> _Count:
    count = _Count(low, high, 0, [], [], [])
    for chunk in chunks:
        magnitudes = chunk.abs()
        upper = magnitudes[magnitudes >= low]
        within = upper[upper <= high]
        count.above += len(upper) - len(within)
        count.inside.append(within[(within > low) & (within < high)])
        count.at_high.append(int((within == high).sum()))
        # where both ends are one value, its entries count once
        count.at_low.append(int((within == low).sum()) if low < high else 0)
    return count


def _cut(count: _Count, kept: int) -> Cut:
    remaining = kept - count.above
    if remaining <= sum(count.at_high):
        return Cut(count.high, _first(remaining, count.at_high))
    remaining -= sum(count.at_high)
    candidates = torch.cat(count.inside)
    if remaining > len(candidates):
        return Cut(count.low, _first(remaining - len(candidates), count.at_low))
    threshold = candidates.kthvalue(len(candidates) - remaining + 1).values
    remaining -= int((candidates > threshold).sum())
    ties = [int((chunk == threshold).sum()) for chunk in count.inside]
    return Cut(float(threshold), _first(remaining, ties))


def _first(number: int, available: list[int]) -> tuple[int, ...]:
    """Share out ``number`` over the chunks in their order, no more than each has."""
    taken = []
    for most in available:
        taken.append(min(number, most))
        number -= taken[-1]
    return tuple(taken)


def _sample(chunks: Iterable[Tensor], size: int) -> Tensor:
    stride = max(1, size // SAMPLE)
    parts, offset = [], 0
    for chunk in chunks:
        parts.append(chunk[offset::stride].abs())
        offset = (offset - len(chunk)) % stride
    return torch.cat(parts).sort().values


def _bracket(ordered: Tensor, share: float) -> tuple[float, float]:
    num = len(ordered)
    margin = 6 * (share * (1 - share) / num) ** 0.5 + 2 / num
    lower, upper = round((1 - share - margin) * num), round((1 - share + margin) * num)
    low = float(ordered[lower]) if lower > 0 else -1.0
    return low, float(ordered[upper]) if upper < num else float("inf")
