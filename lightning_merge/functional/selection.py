"""Exact order statistics of a vector that is too long to hold: one pass with a sampled bracket."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
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

BLOCK = 1 << 18
"""Entries looked at together, so that intermediates stay in the cache, and are worth a thread."""

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


def largest(chunks: Chunks, size: int, kept: int) -> Cut:
    """Find the ``kept`` entries of largest magnitude of a vector given in chunks.

    The chunks are read once for a sample and once to count, see :class:`Search`.

    Args:
        chunks: Gives the vector's chunks in flat order, the same ones at every call.
        size: Entries of the whole vector.
        kept: How many to keep, from 0 to ``size``. Zero keeps nothing (an infinite threshold).

    Raises:
        ValueError: If ``kept`` is out of range or an entry is not a number.
    """
    search = Search(size, kept)
    if search.stride:
        search.take([chunk[:: search.stride] for chunk in chunks()])
    while search.cut is None:
        for index, chunk in enumerate(chunks()):
            search.look(index, chunk.abs())
        search.conclude()
    return search.cut


@final
class Search:
    """Looks for the entries of largest magnitude of a vector that comes in chunks.

    A sample gives a bracket of the threshold, and a look at every chunk what lies around it. A
    bracket that misses (it hardly ever does, being six standard errors wide) is widened for another
    look, so the result is always exact. Memory follows the entries inside the bracket.

    Args:
        size: Entries of the whole vector.
        kept: How many to keep, from 0 to ``size``.

    Raises:
        ValueError: If ``kept`` is out of range.
    """

    def __init__(self, size: int, kept: int) -> None:
        if not 0 <= kept <= size:
            raise ValueError(f"kept must lie in [0, {size}], found {kept}.")
        self.stride = size // min(SAMPLE, max(SMALL, size // 128)) if size > SMALL and kept else 0
        """Of a sample to :meth:`take` before the first look, which may be left out; 0 for none."""
        self.cut: Cut | None = None
        """What was found, once it is certain."""
        self._share, self._kept = kept / max(size, 1), kept
        self._low, self._high = -1.0 if kept else float("inf"), float("inf")
        self._seen: dict[int, _Seen] = {}
        self._inside, self._used, self._lock = torch.empty(0), 0, Lock()

    def take(self, sample: Iterable[Tensor]) -> None:
        """Bracket the threshold by every ``stride``-th entry, or about as many, in any order."""
        self._low, self._high = _bracket(torch.cat([part.abs() for part in sample]), self._share)

    def look(self, index: int, magnitudes: Float[Tensor, " n"]) -> None:
        """Look at one chunk, by its number; several threads may do so at the same time."""
        starts = range(0, max(1, len(magnitudes)), BLOCK)
        parts = [_around(magnitudes[i : i + BLOCK], self._low, self._high) for i in starts]
        above, at_high, inside, at_low = zip(*parts, strict=True)
        # where both ends are one value, its entries count once
        least = sum(at_low) if self._low < self._high else 0
        with self._lock:
            place = slice(self._used, self._used + sum(map(len, inside)))
            self._used = place.stop
            self._grow(inside[0])
            torch.cat(inside, out=self._inside[place])
        self._seen[index] = _Seen(sum(above), sum(at_high), place, least)

    def _grow(self, like: Tensor) -> None:
        # one buffer: many small tensors that stay would lie between those that come and go, and
        # the process would keep the memory of both
        dtype = torch.promote_types(self._inside.dtype, like.dtype)
        if self._used > len(self._inside) or self._inside.dtype != dtype:
            larger = like.new_empty(max(2 * self._used, SMALL), dtype=dtype)
            larger[: len(self._inside)] = self._inside
            self._inside = larger

    def conclude(self) -> None:
        """After a look at every chunk: set ``cut``, or widen the bracket for another look.

        Raises:
            ValueError: If an entry is not a number.
        """
        seen = [self._seen[index] for index in sorted(self._seen)]
        inside = self._inside[: self._used]
        self._seen, self._inside, self._used = {}, torch.empty(0), 0
        above = sum(part.above for part in seen)
        total = above + len(inside) + sum(part.at_high + part.at_low for part in seen)
        if self._kept == 0:
            self.cut = Cut(self._high, (0,) * len(seen), tuple(part.at_high for part in seen))
        elif above >= self._kept:
            self._low, self._high = self._high, float("inf")  # the threshold lies above the bracket
        elif total < self._kept and self._low >= 0:
            self._low, self._high = -1.0, self._low  # or below it
        elif total < self._kept:
            raise ValueError("the vector holds entries that are not a number.")
        else:
            self.cut = _cut(seen, inside, self._low, self._high, self._kept - above)


class _Around(NamedTuple):
    """How a part of the vector lies around a bracket: what is inside, and what equals its ends.

    The ends are counted apart, since one value (zero, most often) may fill much of the vector.
    """

    above: int
    at_high: int
    inside: Tensor
    at_low: int


class _Seen(NamedTuple):
    """How a chunk lies around a bracket, and where in the buffer is what it has inside."""

    above: int
    at_high: int
    place: slice
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


def _cut(seen: Sequence[_Seen], candidates: Tensor, low: float, high: float, remaining: int) -> Cut:
    """The cut below the entries above the bracket, of which ``remaining`` more are kept."""
    at_high, at_low = [part.at_high for part in seen], [part.at_low for part in seen]
    if remaining <= sum(at_high):
        return Cut(high, _first(remaining, at_high), tuple(at_high))
    remaining -= sum(at_high)
    if remaining > len(candidates):
        return Cut(low, _first(remaining - len(candidates), at_low), tuple(at_low))
    threshold = candidates.kthvalue(len(candidates) - remaining + 1).values
    remaining -= int((candidates > threshold).sum())
    tied = tuple(int((candidates[part.place] == threshold).sum()) for part in seen)
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
