"""Held-out error of ridge maps for many ridges at once, from second moments of the folds."""

from dataclasses import dataclass

import torch
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
    """Of the training moments, (..., d): problems side by side, whose errors are added."""
    linear: Tensor
    """Diagonal of B_-' B_f, (..., d)."""
    quadratic: Tensor
    """M, (..., d, d)."""

    def __call__(self, betas: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Errors for absolute ridges, positive or infinite."""
        r = 1 / (self.eigenvalues + betas.view(-1, *[1] * self.eigenvalues.ndim))
        linear = (r * self.linear).flatten(1).sum(1)
        quadratic = ((r[..., None, :] @ self.quadratic)[..., 0, :] * r).flatten(1).sum(1)
        return self.prior_error - 2 * linear + quadratic


@dataclass(frozen=True)
class RotatedFold:
    """One fold and the other folds' moments in the eigenbasis Q of the latter.

    What does not depend on the prior is turned once, so that a prior costs three products.
    """

    basis: Tensor
    """Q, (..., d, d)."""
    eigenvalues: Tensor
    """Of the other folds' second moments, (..., d)."""
    train_cross: Tensor
    """A_- Q, (..., k, d)."""
    fold_cross: Tensor
    """A_f Q, (..., k, d)."""
    fold_gram: Tensor
    """Q' G_f Q, (..., d, d)."""
    fold_energy: float
    """Energy of the expert features of the fold."""

    def curve(self, prior: Float[Tensor, "*batch k d"]) -> HeldOutCurve:
        """The curve of a prior that is already turned, W0 Q."""
        in_fold = prior @ self.fold_gram
        train = self.train_cross - prior * self.eigenvalues[..., None, :]
        fold = self.fold_cross - in_fold
        error = self.fold_energy + float(((in_fold - 2 * self.fold_cross) * prior).sum())
        return HeldOutCurve(
            prior_error=error,
            eigenvalues=self.eigenvalues,
            linear=(train * fold).sum(-2),
            quadratic=(train.mT @ train) * self.fold_gram,
        )


def rotated_fold(
    train_cross: Float[Tensor, "*batch k d"],
    train_gram: Float[Tensor, "*batch d d"],
    fold_cross: Float[Tensor, "*batch k d"],
    fold_gram: Float[Tensor, "*batch d d"],
    fold_energy: float,
) -> RotatedFold:
    """Prepare one fold for any number of priors, in O(d^3 + k d^2).

    Rows may be read through a head H: pass H A and the energy of what it reads, and turn H W0.

    Args:
        train_cross: Cross moment of the other folds.
        train_gram: Second moments of the other folds.
        fold_cross: Cross moment of the fold.
        fold_gram: Second moments of the fold.
        fold_energy: Energy of the expert features of the fold.
    """
    values, Q = torch.linalg.eigh(train_gram)
    return RotatedFold(
        basis=Q,
        eigenvalues=values.clamp_min(0),
        train_cross=train_cross @ Q,
        fold_cross=fold_cross @ Q,
        fold_gram=Q.mT @ fold_gram @ Q,
        fold_energy=fold_energy,
    )
