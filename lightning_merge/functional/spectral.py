"""Leading singular triplets and polar factors through float64 Gram matrices, with certificates.

A Gram matrix squares the condition number, which float64 affords for float32 weights: this is
faster than a singular value decomposition in float32, and some fifty times as accurate. Where
part of the spectrum is asked for, a float32 decomposition gives the start, and steps in float64
against the residual make it exact. Every result is checked, and computed again by a full
decomposition where the check fails.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

CERTIFICATE = 1e-7
"""Largest deviation of computed singular vectors from orthonormality."""

GUARD = 32
"""Directions refined beside those asked for; the gap behind them sets the speed of refinement."""

REFINED = 256
"""Smaller matrices are decomposed in float64 at once."""

RESIDUAL = 1e-11
"""Largest residual of a refined eigenvector, as a fraction of its eigenvalue."""

STEPS = 4
"""Refinements before a float64 decomposition takes over; one or two are usual."""

PROBES = 4
"""Random combinations of vectors whose lengths and angles show whether all are orthonormal."""

SMALL = 1e-2
"""Singular values up to this fraction of the largest, whose squares the Gram matrix's rounding
blurs, are computed again from the matrix itself."""

COLUMNS = 192
"""Width of the blocks of a Gram matrix, of which those above the diagonal are not computed."""


class Factors(NamedTuple):
    """Singular triplets, the largest first: ``left @ diag(values) @ right``, in float64."""

    left: Tensor
    """Left singular vectors (output space), of shape ``(m, k)``."""
    values: Tensor
    """Singular values, of shape ``(k,)``."""
    right: Tensor
    """Right singular vectors (input space), transposed, of shape ``(k, n)``."""

    def truncated(self, rank: int) -> "Factors":
        """The leading ``rank`` triplets, or all if there are fewer."""
        return Factors(self.left[:, :rank], self.values[:rank], self.right[:rank])

    def product(self) -> Tensor:
        """The matrix itself, of shape ``(m, n)``."""
        return (self.left * self.values) @ self.right


def leading_triplets(matrix: Float[Tensor, "m n"], rank: int, rank_tol: float = 1e-5) -> Factors:
    """Leading singular triplets of a matrix, without those that are noise.

    Args:
        matrix: Any real matrix; decomposed in float64.
        rank: How many triplets, at most ``min(m, n)``.
        rank_tol: Singular values up to this fraction of the largest are left out, since their
            vectors are arbitrary where the matrix has a lower rank, yet would count in whitening.

    Returns:
        Up to ``rank`` triplets; none for a zero matrix.
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = leading_triplets(matrix.t(), rank, rank_tol)
        return Factors(right.t(), values, left.t())
    wide = matrix.double()
    values, vectors = right_vectors(gram(wide), rank, rank_tol)
    is_small = values <= SMALL * values[:1]
    found = _along(wide, values[~is_small], vectors[:, ~is_small])
    if bool(is_small.any()):
        small = _within(wide, vectors[:, is_small])
        found = Factors(
            torch.cat([found.left, small.left], 1),
            torch.cat([found.values, small.values]),
            torch.cat([found.right, small.right]),
        )
    return found if is_orthonormal(found.left) else _by_svd(wide, rank, rank_tol)


def right_vectors(
    gram: Float[Tensor, "n n"], rank: int, rank_tol: float = 1e-5
) -> tuple[Float[Tensor, " k"], Float[Tensor, "n k"]]:
    """Leading singular values and right vectors of a matrix, from its Gram matrix alone.

    Arguments are those of :func:`leading_triplets`.
    """
    eigenvalues, vectors = leading_eigenpairs(gram, rank)
    values = eigenvalues.clamp(min=0).sqrt()
    live = values > rank_tol * values[:1]
    return values[live], vectors[:, live]


def leading_eigenpairs(
    symmetric: Float[Tensor, "n n"], rank: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, "n k"]]:
    """Largest eigenvalues, in descending order, and eigenvectors of a float64 Gram matrix."""
    size = len(symmetric)
    if size >= REFINED and 0 < 3 * (rank + GUARD) <= size:
        pairs = _refined(symmetric, rank)
        if pairs is not None:
            return pairs
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(0)[:rank], vectors.flip(1)[:, :rank]


def gram(columns: Float[Tensor, "m n"]) -> Float[Tensor, "n n"]:
    """Products of all columns with each other, block by block: nothing is computed twice."""
    size = columns.shape[1]
    products = columns.new_empty(size, size)
    for start in range(0, size, COLUMNS):
        stop = start + COLUMNS
        block = columns[:, start:].t() @ columns[:, start:stop]
        products[start:, start:stop] = block
        products[start:stop, stop:] = block[COLUMNS:].t()
    return products


def inverse_root(
    gram: Float[Tensor, "k k"], rcond: float = 1e-6, shrinkage: float = 0.0
) -> Float[Tensor, "k k"]:
    r"""Whitening matrix :math:`(G + \epsilon I)^{-1/2}` on the range of a Gram matrix.

    For :math:`G = X^\top X` the product with *X* is its polar factor: orthonormal columns, nearest
    to *X*, where *X* has full rank; on the range of *X* otherwise.

    Args:
        gram: Gram matrix, in float64.
        rcond: Eigenvalues up to ``rcond**2`` of the largest count as zero.
        shrinkage: What is added to every eigenvalue that does not.
    """
    values, vectors = torch.linalg.eigh(gram)
    live = values > rcond**2 * values[-1:].clamp(min=0)
    roots = (values[live] + shrinkage).rsqrt()
    return (vectors[:, live] * roots) @ vectors[:, live].t()


def polar_and_values(
    matrix: Float[Tensor, "m n"], rank_tol: float = 1e-5
) -> tuple[Float[Tensor, "m n"], Float[Tensor, " k"]]:
    """Polar factor :math:`UV^T` of the numerically non-zero part, and its singular values."""
    if matrix.shape[0] < matrix.shape[1]:
        polar, values = polar_and_values(matrix.t(), rank_tol)
        return polar.t(), values
    wide = matrix.double()
    eigenvalues, vectors = torch.linalg.eigh(gram(wide))
    values = eigenvalues.clamp(min=0).sqrt()
    live = values > rank_tol * values[-1:]
    is_small = live & (values <= SMALL * values[-1:])
    large = vectors[:, live & ~is_small]
    # the small product first: cheaper than left vectors, which nobody asks for
    polar = wide @ ((large / values[live & ~is_small]) @ large.t())
    if bool(is_small.any()):
        small = _within(wide, vectors[:, is_small])
        polar.addmm_(small.left, small.right)
        values[is_small] = small.values.flip(0)
    if not is_orthonormal(polar, vectors[:, live]):
        factors = _by_svd(wide, min(wide.shape), rank_tol)
        return factors.left @ factors.right, factors.values
    return polar, values[live].flip(0)


def is_orthonormal(columns: Tensor, within: Tensor | None = None) -> bool:
    """Whether columns, or the combinations of them in ``within``, are orthonormal.

    Random combinations are mapped there and back: a deviation of one entry of the Gram matrix shows
    in each of them, at a fraction of its cost.
    """
    size = columns.shape[1] if within is None else within.shape[1]
    # of its own generator: the same check, whatever the state of the global one
    probes = torch.randn(size, PROBES, generator=torch.Generator().manual_seed(0)).to(columns)
    probes = probes if within is None else within @ probes
    back = columns.t() @ (columns @ probes)
    return size == 0 or float((back - probes).abs().max()) <= CERTIFICATE


def _refined(symmetric: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Leading eigenpairs by a float32 decomposition, corrected in float64; None if that fails.

    A step solves for the part of each vector that lies in the span of the others to first order,
    as the residual shows it, so the error is squared; then a small problem in the leading
    directions is solved exactly (Rayleigh-Ritz).
    """
    scale = symmetric.diagonal().max()
    try:
        single, start = torch.linalg.eigh((symmetric / scale).float())
    except RuntimeError:  # what LAPACK's failure to converge becomes
        return None
    split = len(single) - rank - GUARD
    if not float(single[-rank]) > 1e-5 * float(single[-1]):
        return None  # the last of them is lost in the rounding of float32
    rest, others = start[:, :split].double(), single[:split, None] * scale
    lead = start[:, split:].double()
    image = symmetric @ lead
    values = (lead * image).sum(0) / lead.square().sum(0)
    for _ in range(STEPS):
        residual = image - lead * values
        lead = lead + rest @ ((rest.t() @ residual) / (values - others))
        root, failed = torch.linalg.cholesky_ex(gram(lead))
        if int(failed) or not bool(torch.isfinite(root).all()):
            return None
        lead = torch.linalg.solve_triangular(root.t(), lead, upper=True, left=False)
        image = symmetric @ lead
        values, turn = torch.linalg.eigh(lead.t() @ image)
        lead, image = lead @ turn, image @ turn
        errors = (image - lead * values).norm(dim=0)[-rank:]
        bounds = RESIDUAL * values[-rank:] + 4e-16 * values[-1]
        if bool((errors <= bounds).all()):
            return values.flip(0)[:rank], lead.flip(1)[:, :rank]
    return None


def _along(wide: Tensor, values: Tensor, vectors: Tensor) -> Factors:
    """Triplets from singular values and right vectors."""
    return Factors((wide @ vectors) / values, values, vectors.t())


def _within(wide: Tensor, vectors: Tensor) -> Factors:
    """Triplets of a matrix in the span of some right vectors, by a decomposition of its own."""
    left, values, turn = torch.linalg.svd(wide @ vectors, full_matrices=False)
    return Factors(left, values, turn @ vectors.t())


def _by_svd(wide: Tensor, rank: int, rank_tol: float) -> Factors:
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    kept = int((values[:rank] > rank_tol * values[:1]).sum())
    return Factors(left[:, :kept], values[:kept], right[:kept])
