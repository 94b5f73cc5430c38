"""Scores of a ridge from the statistics of the training samples alone."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class RidgeSpectrum:
    r"""Residuals and degrees of freedom of a ridge towards a prior, as functions of the ridge.

    With :math:`G = Q \Lambda Q^\top`, :math:`B = A - W_0 G` and
    :math:`c_j = \|(B Q)_{:,j}\|^2 / \lambda_j`. The prior counts as fixed: these scores do not
    charge for fitting it, and overrate it where there are fewer samples than features.

    Problems side by side that share the ridge are one: their directions and samples are joined.
    """

    samples: float
    """Number of samples n, of k observations each."""
    outputs: int
    """Width k."""
    eigenvalues: Tensor
    """Of G, (d,); of all problems, (b d,)."""
    explained: Tensor
    """c, (d,): residual energy of the prior along each direction; of all problems, (b d,)."""
    unexplained: float
    """Residual energy that no map removes."""
    fitted_means: int = 0
    """1 if features were centred: one more degree of freedom."""

    def rss(self, betas: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        r"""Residual sum of squares :math:`e_\perp + \sum c_j (\beta / (\lambda_j + \beta))^2`."""
        return self.unexplained + self._shrunk(betas).square() @ self.explained

    def df(self, betas: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        r"""Degrees of freedom :math:`\sum \lambda_j / (\lambda_j + \beta)`, the hat trace."""
        return (1 - self._shrunk(betas)).sum(1) + self.fitted_means

    def gcv(self, betas: Float[Tensor, " b"], gamma: float = 1.4) -> Float[Tensor, " b"]:
        r"""Generalised cross-validation :math:`n\,\mathrm{RSS} / (n - \gamma\,\mathrm{df})^2`.

        Infinite where :math:`\gamma\,\mathrm{df} \ge n`.

        Args:
            betas: Absolute ridges.
            gamma: At least 1; larger guards against too weak a ridge.
        """
        left = self.samples - gamma * self.df(betas)
        score = self.samples * self.rss(betas) / left.square()
        return torch.where(left > 0, score, torch.inf)

    def negative_log_evidence(self, betas: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        r"""Twice the negative log evidence, up to a constant, with the noise profiled out.

        .. math:: k n \ln\left(e_\perp + \sum_j \tfrac{c_j \beta}{\lambda_j + \beta}\right)
            + k \sum_j \ln(1 + \lambda_j / \beta)
        """
        residual = self.unexplained + self._shrunk(betas) @ self.explained
        shrinkage = torch.log1p(self.eigenvalues / betas[:, None]).sum(1)
        return self.outputs * (self.samples * residual.clamp_min(1e-300).log() + shrinkage)

    def _shrunk(self, betas: Tensor) -> Tensor:
        # Written so that an infinite ridge gives one.
        return 1 / (1 + self.eigenvalues / betas[:, None])


def ridge_spectrum(
    cross: Float[Tensor, "*batch k d"],
    gram: Float[Tensor, "*batch d d"],
    energy: float,
    prior: Float[Tensor, "*batch k d"],
    samples: float,
    *,
    centred: bool = False,
) -> RidgeSpectrum:
    """Prepare the scores in O(d^3 + k d^2), for one problem or for several side by side.

    Args:
        cross: A.
        gram: G.
        energy: e, of the expert features; of all problems together.
        prior: W0.
        samples: n; of all problems together.
        centred: Whether the moments are about their means.
    """
    values, Q = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    energies = ((cross - prior @ gram) @ Q).square().sum(-2)
    seen = values > 1e-12 * values[..., -1:]
    explained = torch.where(seen, energies / torch.where(seen, values, 1.0), 0.0)
    left = energy - 2 * float((prior * cross).sum()) + float(((prior @ gram) * prior).sum())
    return RidgeSpectrum(
        samples=samples,
        outputs=cross.shape[-2],
        eigenvalues=values.flatten(),
        explained=explained.flatten(),
        unexplained=max(0.0, left - math.fsum(explained.flatten().tolist())),
        fitted_means=int(centred),
    )


def press(
    merged: Float[Tensor, "d n"],
    expert: Float[Tensor, "k n"],
    prior: Float[Tensor, "k d"],
    beta: float,
) -> float:
    r"""Leave-one-out error of a ridge map with a fixed prior, from the features.

    .. math:: \sum_j \frac{\|y_j - W z_j\|^2}{(1 - h_j)^2}, \qquad
        h_j = z_j^\top (G + \beta I)^{-1} z_j

    Args:
        merged: One column a sample.
        expert: One column a sample.
        prior: W0.
        beta: Absolute ridge, positive.
    """
    gram = merged @ merged.T + beta * torch.eye(len(merged)).to(merged)
    factor = torch.linalg.cholesky(gram)
    residual = expert - prior @ merged
    solved = torch.cholesky_solve(merged, factor)
    leverage = (merged * solved).sum(0)
    left = residual - (residual @ merged.T) @ solved
    return float((left.square().sum(0) / (1 - leverage).square()).sum())
