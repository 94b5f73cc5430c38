"""Exact order statistics of a vector that is too long to hold: one pass with a sampled bracket."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Count: TypeAlias = Literal["round", "floor", "published"]

SAMPLE = 1 << 18
"""Most sampled magnitudes: the bracket of six standard errors then holds 0.6 % of the entries."""

SMALL = 1 << 12
"""A vector that is not longer is selected from as a whole."""

BLOCK = 1 << 16
"""Entries looked at together, so that intermediates stay in the cache."""

Chunks: TypeAlias = Callable[[], Iterable[Float[Tensor, " n"]]]


@final
@dataclass(frozen=True)
class Cut:
    """The entries of a long vector with the largest magnitudes, exactly as many as asked for.

    Kept is what lies above ``threshold``, and of the entries at the threshold those first in flat
    order: ``ties[i]`` of the ``tied[i]`` in the i-th chunk.
    """

    threshold: float
    ties: tuple[int, ...]
    tied: tuple[int, ...]


def num_kept(density: float, size: int, count: Count = "round") -> int:
    """Entries kept of ``size``: the rounded share, and at least one.

    ``floor`` rounds down (as mergekit does), ``published`` keeps one more than that (as the
    authors' code of TIES does, which compares with ``>=``).

    Example:
        >>> num_kept(0.2, 10), num_kept(0.2, 2), num_kept(1.0, 3), num_kept(0.5, 0)
        (2, 1, 3, 0)
    """
    if count == "round":
        return min(size, max(1, round(density * size)))
    return min(size, max(1, int(density * size) + (count == "published")))


def largest(
    chunks: Chunks, size: int, kept: int, sample: Callable[[int], Iterable[Tensor]] | None = None
) -> Cut:
    """Find the ``kept`` entries of largest magnitude of a vector given in chunks.

    The chunks are read once for a sample and once to count; a bracket that misses (it hardly ever
    does, being six standard errors wide) is widened and counted again, so the result is always
    exact. Memory follows the entries inside the bracket.

    Args:
        chunks: Gives the vector's chunks in flat order, the same ones at every call.
        size: Entries of the whole vector.
        kept: How many to keep, from 0 to ``size``. Zero keeps nothing (an infinite threshold).
        sample: Gives every n-th entry, where that is cheaper than reading the chunks.

    Raises:
        ValueError: If ``kept`` is out of range or an entry is not a number.
    """
    if not 0 <= kept <= size:
        raise ValueError(f"kept must lie in [0, {size}], found {kept}.")
    if kept == 0:
        none = tuple(0 for _ in chunks())
        return Cut(float("inf"), none, none)
    low, high = -1.0, float("inf")
    if size > SMALL:
        stride = max(1, size // min(SAMPLE, max(SMALL, size // 128)))
        sampled = sample(stride) if sample else (chunk[::stride] for chunk in chunks())
        low, high = _bracket(torch.cat([part.abs() for part in sampled]), kept / size)
    while True:
        count = _count(chunks(), low, high)
        if count.above >= kept:
            low, high = high, float("inf")  # the threshold lies above the bracket
        elif count.total < kept and low >= 0:
            low, high = -1.0, low  # or below it
        elif count.total < kept:
            raise ValueError("the vector holds entries that are not a number.")
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
        at_high, at_low, inside = 0, 0, [chunk[:0]]
        for start in range(0, len(chunk), BLOCK):
            around = _around(chunk[start : start + BLOCK].abs(), low, high)
            count.above += around.above
            at_high += around.at_high
            # where both ends are one value, its entries count once
            at_low += around.at_low if low < high else 0
            inside.append(around.inside)
        count.at_high.append(at_high)
        count.at_low.append(at_low)
        count.inside.append(torch.cat(inside))
    return count


class _Around(NamedTuple):
    """How a block lies around a bracket."""

    above: int
    at_high: int
    inside: Tensor
    at_low: int


def _around(magnitudes: Tensor, low: float, high: float) -> _Around:
    if magnitudes.device.type != "cpu":
        inside = magnitudes[(magnitudes > low) & (magnitudes < high)]
        counts = [magnitudes > high, magnitudes == high, magnitudes == low]
        more, first, last = (int(mask.sum()) for mask in counts)
        return _Around(more, first, inside, last)
    # NumPy compares and counts several times as fast as torch does on the CPU, without a copy
    values = magnitudes.numpy()
    above = values > high
    within = values[np.flatnonzero(above ^ (values >= low))]
    at_high, at_low = (int(np.count_nonzero(within == end)) for end in (high, low))
    if at_high or at_low:
        within = within[(within > low) & (within < high)]
    return _Around(int(np.count_nonzero(above)), at_high, torch.from_numpy(within), at_low)


def _cut(count: _Count, kept: int) -> Cut:
    remaining = kept - count.above
    if remaining <= sum(count.at_high):
        return Cut(count.high, _first(remaining, count.at_high), tuple(count.at_high))
    remaining -= sum(count.at_high)
    candidates = torch.cat(count.inside)
    if remaining > len(candidates):
        low = _first(remaining - len(candidates), count.at_low)
        return Cut(count.low, low, tuple(count.at_low))
    threshold = candidates.kthvalue(len(candidates) - remaining + 1).values
    remaining -= int((candidates > threshold).sum())
    tied = tuple(int((chunk == threshold).sum()) for chunk in count.inside)
    return Cut(float(threshold), _first(remaining, tied), tied)


def _first(number: int, available: Sequence[int]) -> tuple[int, ...]:
    """Share out ``number`` over the chunks in their order, no more than each has."""
    taken = []
    for most in available:
        taken.append(min(number, most))
        number -= taken[-1]
    return tuple(taken)


def _bracket(sample: Tensor, share: float) -> tuple[float, float]:
    num = len(sample)
    margin = 6 * (share * (1 - share) / num) ** 0.5 + 2 / num
    lower, upper = round((1 - share - margin) * num), round((1 - share + margin) * num)
    # NumPy's sort is several times as fast as torch's on the CPU
    ordered = torch.from_numpy(np.sort(sample)) if sample.device.type == "cpu" else sample.msort()
    low = float(ordered[lower]) if lower > 0 else -1.0
    return low, float(ordered[upper]) if upper < num else float("inf")
