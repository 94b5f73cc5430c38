"""Orthogonal priors of the correction, from second moments alone.

The prior of "From Parameter to Representation: A Closed-Form Approach for Controllable Model
Merging" (ReACT, arXiv 2511.10943) is the orthogonal Procrustes solution. Its singular value
decomposition is arbitrary wherever calibration has no energy; here those directions are anchored
at the identity.
"""

import warnings
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Completion = Literal["identity", "svd"]


def numerical_rank(singular_values: Float[Tensor, " r"], size: int) -> int:
    """Number of singular values above ``10 size eps`` of the largest; they fall in order."""
    tolerance = 10 * size * torch.finfo(singular_values.dtype).eps
    return int((singular_values > tolerance * singular_values[0]).sum())


def orthogonal_factor(
    cross: Float[Tensor, "k d"], *, completion: Completion = "identity", proper: bool = False
) -> Float[Tensor, "k d"]:
    r"""Polar factor :math:`U V^\top` of a matrix, completed where the matrix is rank-deficient.

    With :math:`A = U_1 S_1 V_1^\top` of rank r and orthonormal complements :math:`U_2, V_2`,

    .. math:: W_0 = U_1 V_1^\top + U_2\,\mathrm{polar}(U_2^\top V_2)\,V_2^\top \qquad (k = d),

    which is the minimiser of the Procrustes problem nearest to the identity, and the limit of
    :math:`\mathrm{polar}(A + \tau I)` as :math:`\tau \to 0_+`. For unequal widths there is no
    identity: unseen directions map to zero.

    Args:
        cross: Cross moment :math:`A = Z_i Z_m^\top` (expert times merged features), float64.
        completion: ``"svd"`` keeps the arbitrary choice of the decomposition (the paper's).
        proper: Flip the last left singular vector where the determinant is -1 (k = d).

    Raises:
        ValueError: If the matrix is zero: there is nothing to align.
    """
    k, d = cross.shape
    square = k == d and completion == "identity"
    U, S, Vh = torch.linalg.svd(cross, full_matrices=square)
    if not bool(S[0] > 0):
        raise ValueError(
            "the expert and the merged features have no common energy (their cross moment is "
            "zero): nothing to align. Check that both networks return features, not zeros."
        )
    rank = numerical_rank(S, max(k, d))
    if rank < min(k, d) and completion == "identity":
        seen = U[:, :rank] @ Vh[:rank]
        return _completed(seen, U[:, rank:], Vh[rank:], proper) if square else seen
    W = U @ Vh
    if proper and k == d and bool(torch.linalg.det(W) < 0):
        W = U[:, :-1] @ Vh[:-1] - U[:, -1:] @ Vh[-1:]
    return W


def _completed(
    seen: Float[Tensor, "d d"], U2: Float[Tensor, "d q"], V2h: Float[Tensor, "q d"], proper: bool
) -> Float[Tensor, "d d"]:
    X, S, Yh = torch.linalg.svd(U2.T @ V2h.T)
    deficient = int((S <= 1e-12).sum())
    if deficient:
        warnings.warn(
            f"the prior is not determined in {deficient} unseen directions that the identity does "
            "not fix either; an arbitrary rotation was chosen there. More calibration samples, or "
            "anchor > 0, settle it.",
            stacklevel=2,
        )
    W = seen + U2 @ X @ Yh @ V2h
    if proper and bool(torch.linalg.det(W) < 0):
        W = W - 2 * U2 @ X[:, -1:] @ Yh[-1:] @ V2h
    return W


def procrustes(
    cross: Float[Tensor, "k d"],
    gram: Float[Tensor, "d d"],
    *,
    anchor: float = 0.0,
    completion: Completion = "identity",
    proper: bool = False,
    refine: bool = True,
) -> Float[Tensor, "k d"]:
    r"""Semi-orthogonal :math:`W_0` that best maps merged onto expert features.

    .. math:: W_0 = \mathrm{polar}\left(A + \tau\,\tfrac{\mathrm{tr}\,G}{d}\,I\right)

    For ``k >= d`` this minimises :math:`\|W Z_m - Z_i\|_F` (at :math:`\tau = 0`); for ``k < d`` the
    polar factor solves the reverse problem, and ``refine`` descends from it to a minimiser.

    Args:
        cross: :math:`A = Z_i Z_m^\top`, float64.
        gram: :math:`G = Z_m Z_m^\top`, float64.
        anchor: :math:`\tau \ge 0`, dimensionless: pull to the identity, for ``k = d`` only.
        completion: As in :func:`orthogonal_factor`.
        proper: As in :func:`orthogonal_factor`.
        refine: Whether to refine for ``k < d``.

    Raises:
        ValueError: If the matrix is zero, or an anchor is asked for with ``k != d``.
    """
    k, d = cross.shape
    if anchor > 0:
        if k != d:
            raise ValueError(
                f"anchor = {anchor} pulls to the identity and needs k = d, got {k, d}."
            )
        cross = cross + anchor * (gram.trace() / d) * torch.eye(d).to(cross)
    start = orthogonal_factor(cross, completion=completion, proper=proper)
    return refined_procrustes(start, cross, gram) if refine and k < d else start


def refined_procrustes(
    start: Float[Tensor, "k d"],
    cross: Float[Tensor, "k d"],
    gram: Float[Tensor, "d d"],
    *,
    tolerance: float = 1e-10,
    max_steps: int = 500,
) -> Float[Tensor, "k d"]:
    r"""Descend to a minimiser of :math:`\|W Z_m - Z_i\|_F^2` over :math:`W W^\top = I_k`, k < d.

    Majorisation: :math:`W \leftarrow \mathrm{polar}(A + W(\lambda_{\max} I - G))`. The objective
    falls at every step.

    Args:
        start: Where to begin, with orthonormal rows.
        cross: :math:`A`.
        gram: :math:`G`.
        tolerance: Stops at this relative change of the objective.
        max_steps: Stops after as many steps.
    """
    d = len(gram)
    # Symmetric eigenvalues are exact to rounding; a little more keeps the majoriser above.
    top = torch.linalg.eigvalsh(gram)[-1] * (1 + 1e-12)
    slack = top * torch.eye(d).to(gram) - gram
    W, value = start, _procrustes_value(start, cross, gram)
    for _ in range(max_steps):
        candidate = orthogonal_factor(cross + W @ slack)
        new = _procrustes_value(candidate, cross, gram)
        if not new < value:
            break
        change, W, value = value - new, candidate, new
        if change <= tolerance * max(abs(value), float(cross.norm())):
            break
    return W


def _procrustes_value(
    W: Float[Tensor, "k d"], cross: Float[Tensor, "k d"], gram: Float[Tensor, "d d"]
) -> float:
    return float(((W @ gram) * W).sum() - 2 * (W * cross).sum())


def similarity_scale(
    rotation: Float[Tensor, "k d"], cross: Float[Tensor, "k d"], gram: Float[Tensor, "d d"]
) -> float:
    r"""Best factor c of a map: :math:`c = \mathrm{tr}(W_0 A^\top) / \mathrm{tr}(W_0 G W_0^\top)`.

    Zero energy on the map's input gives 1.
    """
    energy = float(((rotation @ gram) * rotation).sum())
    return float((rotation * cross).sum()) / energy if energy > 0 else 1.0
