"""How experts get in each other's way: norms, cosines, sign conflicts, shared directions."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_merge.functional.tsv import singular_task_interference, truncated_factors


class Interference(NamedTuple):
    """Interference in one parameter, as plain numbers."""

    norms: list[float]
    """Frobenius norm of each task vector."""
    relative_norm: float
    """Root mean square of the norms, divided by the norm of the base; 0 for a base of zeros."""
    cosines: list[list[float]]
    """Cosine of each pair of task vectors; 0 where one is zero."""
    sign_conflict: float
    """Share of the entries that at least two task vectors change, in which two signs differ."""
    singular: float | None
    """Singular task interference, divided by the sum of the singular values; None: no matrix."""


def interference(
    base: Float[Tensor, "*shape"], task_vectors: Float[Tensor, "experts *shape"]
) -> Interference:
    """Measure how the task vectors of one parameter interfere.

    Args:
        base: Pre-trained value.
        task_vectors: Task vectors, stacked in the caller's order. One expert has no conflicts.
    """
    rows = task_vectors.reshape(len(task_vectors), -1).double()
    gram = rows @ rows.t()
    norms = gram.diagonal().clamp(min=0).sqrt()
    scale = norms[:, None] * norms
    cosines = torch.where(scale > 0, gram / scale, 0.0).clamp(-1, 1)
    size = float(base.double().norm())
    return Interference(
        norms=norms.tolist(),
        relative_norm=float(norms.square().mean().sqrt()) / size if size > 0 else 0.0,
        cosines=cosines.tolist(),
        sign_conflict=sign_conflict(task_vectors),
        singular=_singular(task_vectors),
    )


def sign_conflict(task_vectors: Float[Tensor, "experts *shape"]) -> float:
    """Share of the entries changed by two task vectors or more in which two signs differ.

    Example:
        >>> sign_conflict(torch.tensor([[1.0, 1.0, 0.0], [-1.0, 2.0, 3.0]]))
        0.5
    """
    signs = task_vectors.sign()
    shared = signs.abs().sum(dim=0) >= 2
    differ = shared & (signs.sum(dim=0).abs() < signs.abs().sum(dim=0))
    return float(differ.sum()) / max(1, int(shared.sum()))


def _singular(task_vectors: Tensor) -> float | None:
    shape = task_vectors.shape[1:]
    rank = min(shape) // len(task_vectors) if len(shape) == 2 else 0
    if rank == 0:
        return None
    factors = truncated_factors(task_vectors, rank)
    total = sum(float(one.values.sum()) for one in factors)
    return singular_task_interference(factors) / total if total > 0 else 0.0
