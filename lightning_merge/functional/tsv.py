"""TSV-Merge: task singular vectors (Gargiulo et al., CVPR 2025, arXiv:2412.00081)."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_merge.functional.parallel import map_on_cores
from lightning_merge.functional.spectral import Factors, gram, inverse_root, leading_triplets

Matrices: TypeAlias = Sequence[Float[Tensor, "m n"]] | Float[Tensor, "experts m n"]
"""Task vectors of one matrix by expert, stacked or one by one."""


def tsv_merge(
    task_vectors: Matrices,
    rank: int,
    *,
    energy: float = 1.0,
    rank_tol: float = 1e-5,
    rcond: float = 1e-6,
    shrinkage: float = 0.0,
) -> Float[Tensor, "m n"]:
    r"""Merge the leading singular directions of the task vectors, made mutually orthogonal.

    .. math:: \Delta = U_\perp\,\mathrm{diag}(\hat s)\,V_\perp^\top,\quad
        U_\perp = \hat U(\hat U^\top\hat U)^{-1/2}

    with the truncated factors of all tasks side by side (Section 4.2). Null directions are left
    out and the whitening looks at the rank, so that T copies of one task give its truncation; the
    authors' code keeps both, and returns arbitrary directions there.

    Args:
        task_vectors: Task vectors of one matrix. A zero one contributes nothing; one expert that
            keeps its full rank is returned as it is.
        rank: Directions kept of each task; the paper's is ``min(m, n) // T``.
        energy: Keep fewer where this share of a task vector's squared norm is reached before.
        rank_tol: See :func:`lightning_merge.functional.spectral.leading_triplets`.
        rcond: Directions of the joint factors below this fraction of the largest are one.
        shrinkage: Added to the Gram matrices before whitening: softens near-duplicate tasks.

    Returns:
        The merged update, in float64.
    """
    if len(task_vectors) == 1 and rank >= min(task_vectors[0].shape) and energy >= 1:
        return task_vectors[0].double()
    factors = truncated_factors(task_vectors, rank, energy=energy, rank_tol=rank_tol)
    return merge_factors(factors, rcond=rcond, shrinkage=shrinkage)


def truncated_factors(
    task_vectors: Matrices,
    rank: int,
    *,
    energy: float = 1.0,
    rank_tol: float = 1e-5,
) -> list[Factors]:
    """Leading triplets of each task vector, at most ``rank`` and as many as the energy needs."""
    decompose = partial(leading_triplets, rank=rank, rank_tol=rank_tol)
    factors = map_on_cores(decompose, task_vectors, size=task_vectors[0].numel())
    if energy >= 1:
        return factors
    return [
        one.truncated(energy_rank(one.values, float(row.double().square().sum()), energy))
        for one, row in zip(factors, task_vectors, strict=True)
    ]


def energy_rank(values: Float[Tensor, " k"], total: float, energy: float) -> int:
    """Smallest number of leading values with this share of the sum of all squares.

    Example:
        >>> energy_rank(torch.tensor([3.0, 1.0, 0.5]), total=10.25, energy=0.9)
        2
    """
    reached = values.square().cumsum(0) >= energy * total
    return int(reached.long().argmax()) + 1 if bool(reached.any()) else len(values)


def merge_factors(
    factors: Sequence[Factors], *, rcond: float = 1e-6, shrinkage: float = 0.0
) -> Float[Tensor, "m n"]:
    """Whiten the joint factors on both sides and multiply out; arguments as in tsv_merge."""
    left, values, right = joined(factors)
    if not len(values):
        return left.new_zeros(left.shape[0], right.shape[1])

    def whiten(columns: Tensor) -> Tensor:
        return inverse_root(gram(columns), rcond, shrinkage)

    roots = map_on_cores(whiten, [left, right.t()], size=len(values) ** 2)
    # the middle is small: cheaper than whitening both factors
    return torch.linalg.multi_dot([left, (roots[0] * values) @ roots[1], right])


def joined(factors: Sequence[Factors]) -> Factors:
    """The factors of all tasks side by side, in their order."""
    lefts, values, rights = zip(*factors, strict=True)
    return Factors(torch.cat(lefts, 1), torch.cat(values), torch.cat(rights, 0))


class Overlap(NamedTuple):
    """How the joint singular directions of all tasks overlap."""

    interference: float
    """Singular task interference; 0 where the tasks share no direction on one of the sides."""
    condition: float
    """The larger condition number of the joint factors, of the two sides: 1 where directions are
    orthogonal, 1e16 where they are dependent and whitening goes by ``rcond``."""


def overlap(factors: Sequence[Factors]) -> Overlap:
    r"""How much the tasks' singular directions overlap, weighted by their strength (Section 3.2).

    .. math:: \|(\hat U^\top\hat U - I)\,\mathrm{diag}(\hat s)\,(\hat V^\top\hat V - I)\|_1

    entry by entry, and the condition numbers of both factors.
    """
    left, values, right = joined(factors)
    grams = gram(left), gram(right.t())
    eye = torch.eye(len(values), dtype=left.dtype, device=left.device)
    shared = (grams[0] - eye) * values @ (grams[1] - eye)
    conditions = [condition_number(one) for one in grams] if len(values) else [1.0]
    return Overlap(float(shared.abs().sum()), max(conditions))


def condition_number(gram: Float[Tensor, "k k"]) -> float:
    """Condition number of the columns with this Gram matrix, at most 1e16.

    Example:
        >>> condition_number(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        2.0
    """
    values = torch.linalg.eigvalsh(gram)
    return float((values[-1] / values[0].clamp(min=1e-32 * values[-1])).sqrt())
