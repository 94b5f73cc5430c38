"""Held-out error of ridge maps for many ridges at once, from second moments of the folds."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class HeldOutCurve:
    r"""Squared error on one fold of the ridge map trained on the other folds.

    With :math:`G_- = Q \Lambda Q^\top`, :math:`B_- = (A_- - W_0 G_-) Q`,
    :math:`B_f = (A_f - W_0 G_f) Q` and :math:`r_j = 1 / (\lambda_j + \beta)`,

    .. math:: \mathrm{CV}_f(\beta) = e'_f - 2 \sum_j (B_-^\top B_f)_{jj} r_j + r^\top M r,
        \qquad M = (B_-^\top B_-) \circ (Q^\top G_f Q),

    which is exact: no sample is looked at again.
    """

    prior_error: float
    """Error of the prior alone, :math:`e'_f`; the limit of an infinite ridge."""
    eigenvalues: Tensor
    """Of the training moments, (d,)."""
    linear: Tensor
    """Diagonal of B_-' B_f, (d,)."""
    quadratic: Tensor
    """M, (d, d)."""

    def __call__(self, betas: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Errors for absolute ridges, positive or infinite."""
        r = 1 / (self.eigenvalues + betas[:, None])
        return self.prior_error - 2 * r @ self.linear + ((r @ self.quadratic) * r).sum(1)


def held_out_curve(
    spectrum: tuple[Float[Tensor, " d"], Float[Tensor, "d d"]],
    train_cross: Float[Tensor, "k d"],
    train_gram: Float[Tensor, "d d"],
    fold_cross: Float[Tensor, "k d"],
    fold_gram: Float[Tensor, "d d"],
    fold_energy: float,
    prior: Float[Tensor, "k d"],
) -> HeldOutCurve:
    """Prepare the curve of one fold and one prior, in O(d^3 + k d^2).

    Rows may be read through a head H: pass H A, H W0 and the energy of what it reads.

    Args:
        spectrum: Eigenvalues and eigenvectors of ``train_gram``.
        train_cross: Cross moment of the other folds.
        train_gram: Second moments of the other folds.
        fold_cross: Cross moment of the fold.
        fold_gram: Second moments of the fold.
        fold_energy: Energy of the expert features of the fold.
        prior: W0 of the other folds.
    """
    values, Q = spectrum
    in_fold = prior @ fold_gram
    train = (train_cross - prior @ train_gram) @ Q
    fold = (fold_cross - in_fold) @ Q
    error = fold_energy - 2 * (prior * fold_cross).sum() + (in_fold * prior).sum()
    return HeldOutCurve(
        prior_error=float(error),
        eigenvalues=values.clamp_min(0),
        linear=(train * fold).sum(0),
        quadratic=(train.T @ train) * (Q.T @ fold_gram @ Q),
    )
