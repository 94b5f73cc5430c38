"""Iso-C and Iso-CTS: merging with a flat spectrum (Marczak et al., ICML 2025, 2502.04959)."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_merge.functional.lora import lora_factors, sum_factors
from lightning_merge.functional.parallel import map_on_cores
from lightning_merge.functional.spectral import (
    Factors,
    gram,
    inverse_root,
    is_orthonormal,
    leading_triplets,
    polar_and_values,
    right_vectors,
)
from lightning_merge.functional.task_arithmetic import summed
from lightning_merge.functional.tsv import Matrices, joined


def iso_c(task_vectors: Matrices, rank_tol: float = 1e-5) -> Float[Tensor, "m n"]:
    r"""Sum the task vectors and give the sum a flat spectrum (Algorithm 1).

    .. math:: \Delta = \bar\sigma\,UV^\top,\quad \sum_t\tau_t = U\,\mathrm{diag}(\sigma)\,V^\top

    The mean and the product run over the numerical rank, so the nuclear norm is kept; the authors'
    code takes all directions, arbitrary ones of a low-rank sum included.

    Args:
        task_vectors: Task vectors of one matrix. A zero sum gives zero.
        rank_tol: Singular values up to this fraction of the largest count as zero; 0 keeps all.

    Returns:
        The merged update, in float64.
    """
    polar, values = polar_and_values(summed(task_vectors), rank_tol)
    return polar * values.mean() if len(values) else polar


def iso_c_of_factors(
    ups: Sequence[Float[Tensor, "m _"]],
    downs: Sequence[Float[Tensor, "_ n"]],
    rank_tol: float = 1e-5,
) -> Float[Tensor, "m n"]:
    """:func:`iso_c` of low-rank task vectors, without forming them."""
    total = sum_factors(ups, downs, rank_tol)
    polar = total.left @ total.right
    return polar * total.values.mean() if len(total.values) else polar


def iso_cts(
    task_vectors: Matrices,
    common_fraction: float,
    *,
    rank_tol: float = 1e-5,
    rcond: float = 1e-6,
) -> Float[Tensor, "m n"]:
    """Iso-C with a part of the directions given to the single tasks (Algorithm 2).

    The common directions are the leading ones of the sum; each task adds the leading ones of what
    of its task vector lies outside the common left space. All are whitened as in TSV-Merge, and
    get one singular value, the mean of theirs.

    Args:
        task_vectors: Task vectors of one matrix.
        common_fraction: Share of the directions that are common, in [0, 1]; 1 is Iso-C.
        rank_tol: As in :func:`iso_c`.
        rcond: As in :func:`lightning_merge.functional.tsv.tsv_merge`.

    Returns:
        The merged update, in float64.
    """
    size = min(task_vectors[0].shape)
    own = task_rank(size, len(task_vectors), common_fraction)
    if own == 0:
        return iso_c(task_vectors, rank_tol)
    shared_rank = size - own * len(task_vectors)
    total = summed(task_vectors)
    common = leading_triplets(total, shared_rank, rank_tol)
    outside: Callable[[Tensor], Factors]
    if total.shape[0] <= total.shape[1]:
        basis = torch.linalg.qr(common.left, mode="complete").Q[:, len(common.values) :]
        outside = partial(_within, basis=basis, rank=own, rank_tol=rank_tol)
    else:
        outside = partial(_beside, common=common, rank=own, rank_tol=rank_tol)
    return _whitened_flat(map_on_cores(outside, task_vectors, size=total.numel()), common, rcond)


def iso_cts_of_factors(
    ups: Sequence[Float[Tensor, "m _"]],
    downs: Sequence[Float[Tensor, "_ n"]],
    common_fraction: float,
    *,
    rank_tol: float = 1e-5,
    rcond: float = 1e-6,
) -> Float[Tensor, "m n"]:
    """:func:`iso_cts` of low-rank task vectors, without forming them.

    What lies outside the common left space is a product too, with the same right factor.
    """
    size = min(len(ups[0]), downs[0].shape[1])
    own = task_rank(size, len(ups), common_fraction)
    if own == 0:
        return iso_c_of_factors(ups, downs, rank_tol)
    common = sum_factors(ups, downs, rank_tol).truncated(size - own * len(ups))
    parts = [
        _factors_outside(up.double(), down.double(), common, own, rank_tol)
        for up, down in zip(ups, downs, strict=True)
    ]
    return _whitened_flat(parts, common, rcond)


def task_rank(size: int, num_experts: int, common_fraction: float) -> int:
    """Directions of each task's own: the rest divided by the tasks, so that all fit.

    Example:
        >>> task_rank(768, 8, 0.8), task_rank(50, 20, 0.8), task_rank(30, 20, 0.0)
        (19, 0, 1)
    """
    rest = size - int(size * common_fraction)
    return min(round(rest / num_experts), size // num_experts)


def _within(task_vector: Tensor, basis: Tensor, rank: int, rank_tol: float) -> Factors:
    """Leading triplets of a task vector's part in the space of an orthonormal basis."""
    wide = task_vector.double()
    part = basis.t() @ wide
    if _is_rounding(part.norm(), wide.norm(), rank_tol):
        return _nothing(wide)
    found = leading_triplets(part, rank, rank_tol)
    return found._replace(left=basis @ found.left)


def _beside(task_vector: Tensor, common: Factors, rank: int, rank_tol: float) -> Factors:
    """Leading triplets of a task vector's part outside the common left space.

    For tall matrices: of that part only the Gram matrix is formed, the difference of two.
    """
    wide = task_vector.double()
    part = common.left.t() @ wide
    whole = gram(wide)
    rest = whole - gram(part)
    if _is_rounding(rest.trace().clamp(min=0).sqrt(), whole.trace().sqrt(), rank_tol):
        return _nothing(wide)
    values, vectors = right_vectors(rest, rank, rank_tol)
    left = (wide @ vectors - common.left @ (part @ vectors)) / values
    if not is_orthonormal(left):  # a rest of low rank: the difference has its rounding
        return leading_triplets(wide - common.left @ part, rank, rank_tol)
    return Factors(left, values, vectors.t())


def _factors_outside(
    up: Tensor, down: Tensor, common: Factors, rank: int, rank_tol: float
) -> Factors:
    rest = lora_factors(up - common.left @ (common.left.t() @ up), down, rank_tol)
    whole = lora_factors(up, down, rank_tol)
    nothing = _is_rounding(rest.values.norm(), whole.values.norm(), rank_tol)
    return rest.truncated(0 if nothing else rank)


def _is_rounding(part: Tensor, whole: Tensor, rank_tol: float) -> bool:
    """Whether a norm is what rounding leaves of a task vector in the common space alone.

    Its directions would be arbitrary, however large they look beside each other.
    """
    return float(part) <= rank_tol * float(whole)


def _nothing(matrix: Tensor) -> Factors:
    return Factors(matrix[:, :0], matrix.new_zeros(0), matrix[:0])


def _whitened_flat(parts: Sequence[Factors], common: Factors, rcond: float) -> Tensor:
    """The joint factors, whitened on both sides, all with the mean of their singular values.

    On the left the tasks' own directions are orthogonal to the common ones, which are orthonormal.
    """
    own = joined(parts)
    everything = joined([own, common])
    if not len(everything.values):
        return everything.left.new_zeros(len(everything.left), everything.right.shape[1])
    left = torch.cat([own.left @ inverse_root(gram(own.left), rcond), common.left], 1)
    root = inverse_root(gram(everything.right.t()), rcond)
    return everything.values.mean() * torch.linalg.multi_dot([left, root, everything.right])
