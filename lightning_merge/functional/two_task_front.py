"""All mixtures of two tasks at once, by one generalised symmetric eigenproblem."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class TwoTaskFront:
    r"""Every map of the mixtures :math:`w_a L_a + w_b L_b`, with no further factorisation.

    With :math:`S^\top C_a S = I` and :math:`C_b S = C_a S\,\mathrm{diag}(\mu)`,

    .. math:: W = (w_a N_a S + w_b N_b S)\,\mathrm{diag}\left(\frac{1}{w_a + w_b \mu}\right) S^\top.
    """

    basis: Tensor
    """S, (d, d)."""
    ratios: Tensor
    """Generalised eigenvalues, (d,)."""
    target_a: Tensor
    """N_a S, (k, d), or rows of it read by a head."""
    target_b: Tensor
    """N_b S."""

    def maps(self, a: Float[Tensor, " p"], b: Float[Tensor, " p"]) -> Float[Tensor, "p k d"]:
        """Maps for P pairs of weights, non-negative and not both zero."""
        return self.coordinates(a, b) @ self.basis.T

    def coordinates(self, a: Float[Tensor, " p"], b: Float[Tensor, " p"]) -> Tensor:
        """Maps of features that were already turned to ``features @ basis``, in O(k d) each."""
        mixed = a[:, None, None] * self.target_a + b[:, None, None] * self.target_b
        return mixed / (a[:, None] + b[:, None] * self.ratios)[:, None]

    def read_by(self, head: Float[Tensor, "c k"]) -> "TwoTaskFront":
        """The front of folded heads."""
        return TwoTaskFront(self.basis, self.ratios, head @ self.target_a, head @ self.target_b)


def two_task_front(
    curvature_a: Float[Tensor, "d d"],
    target_a: Float[Tensor, "k d"],
    curvature_b: Float[Tensor, "d d"],
    target_b: Float[Tensor, "k d"],
) -> TwoTaskFront:
    """Diagonalise two curvatures together; the first must be positive definite.

    Raises:
        ValueError: If it is not.
    """
    L, info = torch.linalg.cholesky_ex(curvature_a)
    if int(info):
        raise ValueError(
            "the first task's second moments are not positive definite: give it a ridge (beta > 0)."
        )
    half = torch.linalg.solve_triangular(L, curvature_b, upper=False)
    whitened = torch.linalg.solve_triangular(L, half.T, upper=False)
    ratios, Q = torch.linalg.eigh((whitened + whitened.T) / 2)
    S = torch.linalg.solve_triangular(L.T, Q, upper=True)
    return TwoTaskFront(S, ratios.clamp_min(0), target_a @ S, target_b @ S)
