"""How experts get in each other's way: norms, cosines, sign conflicts, shared directions."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_merge.functional.tsv import Overlap, overlap, truncated_factors

BLOCK = 1 << 17
"""Entries of each task vector that are looked at together, so that they stay in the cache."""


class Interference(NamedTuple):
    """Interference in one parameter or in several, as plain numbers."""

    norms: list[float]
    """Frobenius norm of each task vector."""
    relative_norms: list[float]
    """The same over the norm of the base; 0 for a base of zeros."""
    cosines: list[list[float]]
    """Cosine of each pair of task vectors; 0 where one is zero."""
    sign_conflict: float
    """Share of the pairs of task vectors that both change an entry in which signs differ.

    One half is chance."""
    singular: float | None
    """Singular task interference, divided by the sum of the singular values; None: not measured."""
    condition: float | None
    """Largest condition number of the joint singular directions that TSV-M whitens."""


@dataclass(frozen=True, kw_only=True)
class InterferenceSums:
    """What interference is computed from: sums over entries, so that parameters add up."""

    gram: Tensor
    """Inner products of the task vectors, ``(T, T)``, float64."""
    base_square: float
    """Squared norm of the base."""
    shared: int
    """Pairs of task vectors, entry by entry, that both change the entry."""
    conflicts: int
    """Those of them that differ in sign."""
    singular: float = 0.0
    """Singular task interference of the matrices measured."""
    singular_values: float = 0.0
    """Sum of the singular values that it is made from."""
    condition: float = 0.0
    """Largest condition number of the joint singular directions."""
    matrices: int = 0
    """Matrices whose singular directions were measured."""

    def __add__(self, other: "InterferenceSums") -> "InterferenceSums":
        return InterferenceSums(
            gram=self.gram + other.gram,
            base_square=self.base_square + other.base_square,
            shared=self.shared + other.shared,
            conflicts=self.conflicts + other.conflicts,
            singular=self.singular + other.singular,
            singular_values=self.singular_values + other.singular_values,
            condition=max(self.condition, other.condition),
            matrices=self.matrices + other.matrices,
        )

    def ratios(self) -> Interference:
        """The sums as norms, cosines and shares."""
        norms = self.gram.diagonal().clamp(min=0).sqrt()
        scale = norms[:, None] * norms
        cosines = torch.where(scale > 0, self.gram / scale, 0.0).clamp(-1, 1)
        size = self.base_square**0.5
        total = self.singular_values
        singular = (self.singular / total if total > 0 else 0.0) if self.matrices else None
        return Interference(
            norms=norms.tolist(),
            relative_norms=[norm / size if size > 0 else 0.0 for norm in norms.tolist()],
            cosines=cosines.tolist(),
            sign_conflict=self.conflicts / max(1, self.shared),
            singular=singular,
            condition=self.condition if self.matrices else None,
        )


def interference_sums(
    base: Float[Tensor, "*shape"],
    task_vectors: Float[Tensor, "experts *shape"],
    *,
    singular: bool = True,
) -> InterferenceSums:
    """Measure how the task vectors of one parameter interfere.

    Args:
        base: Pre-trained value.
        task_vectors: Task vectors, stacked in the caller's order. One expert has no conflicts.
        singular: Measure the singular task interference too, where the parameter is a matrix with
            a direction for every expert; it costs a decomposition of every task vector.
    """
    rows = task_vectors.reshape(len(task_vectors), -1)
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    shared = conflicts = 0
    for block in rows.split(BLOCK, dim=1):
        wide = block.double()
        gram += wide @ wide.t()
        counts = sign_counts(block)
        shared, conflicts = shared + counts[0], conflicts + counts[1]
    measured = _singular(task_vectors) if singular else None
    return InterferenceSums(
        gram=gram.cpu(),
        base_square=float(torch.linalg.vector_norm(base, dtype=torch.float64)) ** 2,
        shared=shared,
        conflicts=conflicts,
        singular=measured[0].interference if measured else 0.0,
        singular_values=measured[1] if measured else 0.0,
        condition=measured[0].condition if measured else 0.0,
        matrices=int(measured is not None),
    )


def sign_counts(task_vectors: Float[Tensor, "experts *shape"]) -> tuple[int, int]:
    """How many pairs of task vectors both change an entry, and in how many of them signs differ.

    Example:
        >>> sign_counts(torch.tensor([[1.0, 1.0, 0.0], [-1.0, 2.0, 3.0]]))
        (2, 1)
    """
    positive = (task_vectors > 0).sum(dim=0)
    negative = (task_vectors < 0).sum(dim=0)
    changed = positive + negative
    return int((changed * (changed - 1)).sum()) // 2, int((positive * negative).sum())


def singular_cost(shape: tuple[int, ...], num_experts: int) -> float:
    """Rough floating-point operations of a matrix's singular interference; 0: nothing to measure.

    A Gram matrix of the smaller side and its eigenvectors, for every expert, and the eigenvalues
    of two more.
    """
    if len(shape) != 2 or min(shape) < num_experts:
        return 0.0
    small, large = sorted(shape)
    return float(num_experts * small**2 * (large + 8 * small) + 4 * small**3)


def _singular(task_vectors: Tensor) -> tuple[Overlap, float] | None:
    """What the singular directions of a matrix share, and the sum of its singular values."""
    shape = task_vectors.shape[1:]
    rank = min(shape) // len(task_vectors) if len(shape) == 2 else 0
    if rank == 0:
        return None
    factors = truncated_factors(task_vectors, rank)
    total = sum(float(one.values.sum()) for one in factors)
    return overlap(factors), total
