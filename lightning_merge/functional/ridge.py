"""Linear systems of least squares: ``W M = N``, its limits, and the dual form."""

import functools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def solve_right(
    target: Float[Tensor, "*batch k d"], curvature: Float[Tensor, "*batch d d"]
) -> Float[Tensor, "*batch k d"]:
    r"""Solve :math:`W M = N` for symmetric positive definite M by Cholesky, and check it.

    The backward error :math:`\|W M - N\|_F / (\|W\|_F \|M\|_2 + \|N\|_F)` must be at most
    ``1e-12 d``, estimated along random directions; one step of refinement is tried before giving
    up.

    Args:
        target: N, float64.
        curvature: M, float64.

    Raises:
        ValueError: If M is not positive definite, or the solution is not accurate.
    """
    factor = _factorised(curvature)
    if factor.failed:
        raise ValueError(
            "the second moments are not positive definite even with the ridge: they hold NaN or "
            "were damaged. Collect the statistics again, or raise beta."
        )
    solution = factor.solve(target)
    limit = 1e-12 * curvature.shape[-1]
    if not _backward_error(solution, target, curvature) <= limit:
        residual = target - solution @ curvature
        solution = solution + factor.solve(residual)
        error = _backward_error(solution, target, curvature)
        if not error <= limit:
            raise ValueError(
                f"the least squares could not be solved accurately: backward error {error:.1e}, "
                f"allowed {limit:.1e}. Raise beta, or check the inputs for extreme values."
            )
    return solution


ALIASED = 2048
"""Rows that are multiples of so many bytes compete for the same lines of a processor's cache."""


@dataclass(frozen=True)
class _Factor:
    """Lower Cholesky factor, in one or 2 x 2 blocks; batched."""

    blocks: tuple[Tensor, ...]
    """L, or L11, L21 and L22."""
    failed: bool
    """Whether a matrix was not positive definite."""

    def solve(self, target: Float[Tensor, "*batch k d"]) -> Float[Tensor, "*batch k d"]:
        """X of ``X L L' = N``."""
        if len(self.blocks) == 1:
            return torch.cholesky_solve(target.mT, self.blocks[0]).mT
        first, below, second = self.blocks
        cut = first.shape[-1]
        low = _forward(target[..., :cut], first)
        high = _forward(target[..., cut:] - low @ below.mT, second)
        high = _backward(high, second)
        return torch.cat([_backward(low - high @ below, first), high], -1)


def _factorised(matrix: Float[Tensor, "*batch d d"]) -> _Factor:
    """Cholesky factor of symmetric matrices.

    At d = 512 or 1024 a column is a multiple of the cache's period, and a factorisation takes twice
    as long as at 520; there it is done in two blocks of other sizes.
    """
    d = matrix.shape[-1]
    if matrix.device.type != "cpu" or d < 256 or d * matrix.element_size() % ALIASED:
        factor, info = torch.linalg.cholesky_ex(matrix)
        return _Factor((factor,), bool(info.any()))
    cut = d // 2 + 8
    first, info = torch.linalg.cholesky_ex(matrix[..., :cut, :cut])
    below = _forward(matrix[..., cut:, :cut], first)
    second, other = torch.linalg.cholesky_ex(matrix[..., cut:, cut:] - below @ below.mT)
    return _Factor((first, below, second), bool((info | other).any()))


def _forward(target: Tensor, factor: Tensor) -> Tensor:
    """X of ``X L' = N``; the layout spares copies."""
    return torch.linalg.solve_triangular(factor, target.mT, upper=False).mT


def _backward(target: Tensor, factor: Tensor) -> Tensor:
    """X of ``X L = N``."""
    return torch.linalg.solve_triangular(factor.mT, target.mT, upper=True).mT


PROBES = 8
"""Fixed random directions along which the residual of a solve is measured."""


def _backward_error(
    solution: Float[Tensor, "*batch k d"],
    target: Float[Tensor, "*batch k d"],
    curvature: Float[Tensor, "*batch d d"],
) -> float:
    """Estimate of the backward error, without bias, at the cost of a few columns."""
    probes = _probes(curvature.shape[-1]).to(curvature)
    residual = solution @ (curvature @ probes) - target @ probes
    # No diagonal entry exceeds the spectral norm, so this errs on the safe side at no cost.
    spectral = curvature.diagonal(dim1=-2, dim2=-1).amax(-1)
    scale = torch.linalg.matrix_norm(solution) * spectral + torch.linalg.matrix_norm(target)
    size = torch.linalg.matrix_norm(residual)
    return float((size / scale.clamp_min(torch.finfo(scale.dtype).tiny)).max())


@functools.lru_cache(maxsize=8)
def _probes(d: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(d, min(PROBES, d), generator=generator, dtype=torch.float64)
    return probes / probes.shape[1] ** 0.5


def ridge_towards(
    cross: Float[Tensor, "*batch k d"],
    gram: Float[Tensor, "*batch d d"],
    prior: Float[Tensor, "*batch k d"],
    ridge: float,
) -> Float[Tensor, "*batch k d"]:
    r"""Least squares with a ridge towards a prior, and its limits at zero and infinity.

    .. math:: W = (A + \beta W_0)(G + \beta I)^{-1}

    The one solver of the correction, RegMean and output projection.

    Args:
        cross: :math:`A`.
        gram: :math:`G`, positive semi-definite.
        prior: :math:`W_0`.
        ridge: :math:`\beta`, absolute; 0 gives :func:`ridgeless`, infinity the prior.
    """
    if math.isinf(ridge):
        return prior.clone()
    if ridge == 0:
        return ridgeless(cross, gram, prior)
    identity = torch.eye(gram.shape[-1]).to(gram)
    return solve_right(cross + ridge * prior, gram + ridge * identity)


def ridgeless(
    cross: Float[Tensor, "*batch k d"],
    gram: Float[Tensor, "*batch d d"],
    prior: Float[Tensor, "*batch k d"],
) -> Float[Tensor, "*batch k d"]:
    r"""Limit of vanishing ridge: the least-squares solution nearest to the prior.

    .. math:: W = W_0 + (A - W_0 G)\,G^{+}

    Args:
        cross: :math:`A`.
        gram: :math:`G`, positive semi-definite; of any rank.
        prior: :math:`W_0`, kept on the null space of G.
    """
    inverse, Q = pseudo_spectrum(gram)
    return prior + (((cross - prior @ gram) @ Q) * inverse[..., None, :]) @ Q.mT


def pseudo_spectrum(
    gram: Float[Tensor, "*batch d d"],
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch d d"]]:
    r"""Eigenvalues of :math:`G^{+}` and the eigenvectors, :math:`G^{+} = Q\,\mathrm{diag}\,Q^\top`.

    Eigenvalues of G below ``10 d eps`` of the largest count as zero.
    """
    values, Q = torch.linalg.eigh(gram)
    tolerance = 10 * gram.shape[-1] * torch.finfo(values.dtype).eps
    seen = (values > tolerance * values[..., -1:]) & (values > 0)
    return torch.where(seen, 1 / torch.where(seen, values, 1.0), 0.0), Q


def dual_ridge(
    merged: Float[Tensor, "d n"],
    expert: Float[Tensor, "k n"],
    prior: Float[Tensor, "k d"],
    beta: float,
) -> Float[Tensor, "k d"]:
    r"""Ridge towards a prior through the n x n kernel: cheaper when n is far below d.

    .. math:: W = W_0 + (Z_i - W_0 Z_m)(Z_m^\top Z_m + \beta I)^{-1} Z_m^\top

    Equal to the primal :math:`(A + \beta W_0)(G + \beta I)^{-1}`. For several tasks put their
    columns side by side, each scaled by :math:`\sqrt{w_t}`, with
    :math:`\bar\beta = \sum w_t \beta_t` and
    :math:`\bar W_0 = \sum w_t \beta_t W_{0,t} / \bar\beta`.

    Args:
        merged: Features of the merged backbone, one column a sample.
        expert: Features of the expert on the same samples.
        prior: :math:`W_0`.
        beta: Absolute ridge, positive.
    """
    kernel = merged.T @ merged + beta * torch.eye(merged.shape[1]).to(merged)
    return prior + solve_right(expert - prior @ merged, kernel) @ merged.T
