"""TIES-Merging: trim, elect sign, merge (Yadav et al., NeurIPS 2023, arXiv:2306.01708)."""

from collections.abc import Callable
from functools import cache, partial
from typing import Literal, TypeAlias, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import hardshrink

from lightning_merge.functional.selection import Count, largest, num_kept

Combine: TypeAlias = Literal["mean", "sum", "max"]
ZeroSign: TypeAlias = Literal["majority", "positive", "none"]
SumOrTies: TypeAlias = Literal["sum", "ties"]

BLOCK = 1 << 17
"""Entries merged at once: the passes over them stay in the cache, and are long beside a call."""


@final
class Room:
    """Memory for the intermediates of one block after another.

    Memory that is allocated anew costs more than an operation on a block of it.

    Args:
        num_experts: T.
        size: Entries of the largest block.
        like: A tensor of the intermediates' dtype and device.
    """

    def __init__(self, num_experts: int, size: int, like: Tensor) -> None:
        self._num_experts = num_experts
        self._wide = [like.new_empty(num_experts * size) for _ in range(2)]
        self._narrow = [like.new_empty(size) for _ in range(4)]
        self.one = like.new_ones(())

    def wide(self, size: int) -> list[Tensor]:
        """Two tensors of shape ``(T, size)``: for trimmed task vectors, and for consensus."""
        return [one[: self._num_experts * size].view(self._num_experts, size) for one in self._wide]

    def narrow(self, size: int) -> list[Tensor]:
        """Four of shape ``(size,)``, of which the third holds a consensus."""
        return [one[:size] for one in self._narrow]


def trim_by(
    task_vector: Float[Tensor, "*shape"], threshold: float, ties: int
) -> tuple[Float[Tensor, "*shape"], int]:
    """Zero the entries below a threshold; the trimmed tensor, and how many ties it keeps.

    Args:
        task_vector: One expert's task vector of one parameter.
        threshold: Magnitude above which every entry stays.
        ties: How many entries at the threshold stay: the first ones in flat order.
    """
    trimmed = hardshrink(task_vector, threshold)
    if ties == 0:
        return trimmed, 0
    equal = torch.eq(task_vector.abs(), threshold).flatten().nonzero().squeeze(1)[:ties]
    trimmed.view(-1)[equal] = task_vector.reshape(-1)[equal]
    return trimmed, len(equal)


def trim(
    task_vectors: Float[Tensor, "experts *shape"], density: float, count: Count = "round"
) -> Float[Tensor, "experts *shape"]:
    """Keep exactly the share ``density`` of each task vector, by magnitude; zero the rest.

    At least one entry is kept; of equal magnitudes the first in flat order stay (Section 4.1; the
    authors' code keeps all ties, and one entry more).

    Example:
        >>> trim(torch.tensor([[3.0, -1.0, 0.5, -4.0]]), density=0.5)
        tensor([[ 3.,  0.,  0., -4.]])
    """
    rows = []
    for row in task_vectors:
        flat = row.reshape(-1)
        cut = largest(partial(list, (flat,)), len(flat), num_kept(density, len(flat), count))
        rows.append(trim_by(row, cut.threshold, cut.ties[0])[0])
    return torch.stack(rows)


def sign_consensus(
    trimmed: Float[Tensor, "experts *shape"],
    combine: Combine = "mean",
    zero_sign: ZeroSign = "majority",
    majority: Callable[[], float] | None = None,
    weights: Float[Tensor, " experts"] | None = None,
) -> Float[Tensor, "*shape"]:
    r"""Elect signs and merge what has them: Sections 4.2 and 4.3.

    With weights the sign is that of :math:`\sum_t w_t\hat\tau_t`, and the mean over the task
    vectors :math:`\mathcal A` that have it is

    .. math:: \sum_{t\in\mathcal A} w_t\,\hat\tau_t \Big/ \sum_{t\in\mathcal A} w_t

    Args:
        trimmed: Trimmed task vectors of one parameter; zeros take no part.
        combine: The mean of the entries with the elected sign, their sum, or the largest.
        zero_sign: The sign where task vectors cancel exactly.
        majority: Gives the sign of most entries, asked only where task vectors cancel; by default
            that of this parameter.
        weights: Of the experts, at least 0; all alike by default.

    Example:
        >>> sign_consensus(torch.tensor([[2.0, 1.0, 0.0], [-1.0, 3.0, 0.0]]))
        tensor([2., 2., 0.])
    """
    flat = trimmed.reshape(len(trimmed), -1)
    majority = cache(majority or (lambda: majority_sign(flat, weights)))
    merged = torch.empty_like(flat[0])
    for start in range(0, flat.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        merged[part] = block_consensus(flat[:, part], combine, zero_sign, majority, weights=weights)
    return merged.view(trimmed.shape[1:])


def block_consensus(
    trimmed: Float[Tensor, "experts n"],
    combine: Combine,
    zero_sign: ZeroSign,
    majority: Callable[[], float],
    room: Room | None = None,
    weights: Float[Tensor, " experts"] | None = None,
) -> Float[Tensor, " n"]:
    """What :func:`sign_consensus` does to a block that fits into the cache, of n > 0 entries.

    With ``room`` the result lies in it, until its next use.
    """
    # Products and sums in the cache are on the CPU several times as fast as masks. Where the sum
    # is zero the sign is plus for now: nothing agrees with it unless task vectors cancel there.
    room = room or Room(len(trimmed), trimmed.shape[1], trimmed)
    trimmed = _weighted(trimmed, weights)
    total, sides, _, _ = room.narrow(trimmed.shape[1])
    torch.sum(trimmed, 0, out=total)
    torch.copysign(room.one, total, out=sides)
    chosen = _of_side(trimmed, sides, combine, room, weights).mul_(sides)
    if zero_sign == "positive":
        return chosen
    signs = total.sign_()
    if zero_sign == "none":
        return chosen.mul_(signs.abs_())
    columns = cancelled(signs, chosen)
    if len(columns) and (sign := majority()) <= 0:
        chosen[columns] = sign * minus_side(trimmed[:, columns], combine, weights)
    return chosen


def cancelled(signs: Float[Tensor, " n"], chosen: Float[Tensor, " n"]) -> Int64[Tensor, " columns"]:
    """Columns in which task vectors cancel: the sign is 0, yet some entries are positive.

    Args:
        signs: Signs of the sums; they are overwritten.
        chosen: What is chosen where a sign of 0 counts as plus.
    """
    marks = signs.abs_().sub_(1).mul_(chosen)
    if not float(marks.min()) < 0:
        return torch.empty(0, dtype=torch.int64, device=signs.device)
    return marks.nonzero().squeeze(1)


def minus_side(
    trimmed: Float[Tensor, "experts n"],
    combine: Combine,
    weights: Float[Tensor, " experts"] | None = None,
) -> Float[Tensor, " n"]:
    """Magnitude of what is chosen where the sign is minus, of weighted task vectors."""
    room = Room(len(trimmed), trimmed.shape[1], trimmed)
    return _of_side(trimmed, torch.full_like(trimmed[0], -1.0), combine, room, weights)


def _of_side(
    trimmed: Tensor, sides: Tensor, combine: Combine, room: Room, weights: Tensor | None
) -> Tensor:
    """Mean, sum or maximum of the magnitudes of the entries that have the sign of their column.

    They have been multiplied by the weights, of which a mean needs the sum as well.
    """
    size = trimmed.shape[1]
    _, _, chosen, number = room.narrow(size)
    agreeing = torch.mul(trimmed, sides, out=room.wide(size)[1]).relu_()
    if combine == "max":
        return torch.amax(agreeing, 0, out=chosen)
    torch.sum(agreeing, 0, out=chosen)
    if combine == "mean" and weights is None:
        chosen.div_(torch.sum(agreeing.sign_(), 0, out=number).clamp_(min=1))
    elif combine == "mean":
        assert weights is not None
        torch.mv(agreeing.sign_().t(), weights.to(agreeing), out=number)
        chosen.div_(number.clamp_(min=torch.finfo(number.dtype).tiny))
    return chosen


def _weighted(trimmed: Tensor, weights: Tensor | None) -> Tensor:
    return trimmed if weights is None else trimmed * weights.to(trimmed)[:, None]


def combined(
    task_vectors: Float[Tensor, "experts *shape"], combine: SumOrTies
) -> Float[Tensor, "*shape"]:
    """Combine thinned-out task vectors: their sum, or the mean of those with the elected sign."""
    return task_vectors.sum(dim=0) if combine == "sum" else sign_consensus(task_vectors)


def majority_sign(
    trimmed: Float[Tensor, "experts n"], weights: Float[Tensor, " experts"] | None = None
) -> float:
    """Sign that most entries elect: -1, 1, or 0 if as many are positive as negative."""
    return float(elect(trimmed, weights).sum(dtype=torch.float64).sign())


def elect(
    trimmed: Float[Tensor, "experts n"], weights: Float[Tensor, " experts"] | None = None
) -> Float[Tensor, " n"]:
    r"""Elect the sign of every entry: that of the larger total magnitude (Section 4.2).

    .. math:: \gamma_j = \operatorname{sgn}\big(\sum_t w_t\,\hat\tau_{t,j}\big)

    Args:
        trimmed: Trimmed task vectors. Where they cancel exactly, the sign is 0.
        weights: Of the experts; all one by default.
    """
    return _weighted(trimmed, weights).sum(dim=0).sign()
