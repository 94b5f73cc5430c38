r"""Merging one layer as least squares on its outputs: objective, bases, captured energy.

After "Model Merging by Output-Space Projection" (Etheridge, Evans, Tanner, Roberts, arXiv
2605.29101). A layer is g problems side by side (the groups of a convolution; one for a linear
layer) with updates :math:`\Delta W` of shape (g, o, i). With inputs :math:`X_t`, residual targets
:math:`R_t = Y_t - W_0 X_t` and weights :math:`w_t`,

.. math:: J(\Delta W) = \sum_t w_t \|\Delta W X_t - R_t\|_F^2
    = \mathrm{tr}(\Delta W G \Delta W^\top) - 2\,\mathrm{tr}(\Delta W P^\top) + e.

Every basis turns this into a :class:`System`, least squares in its coefficients.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_merge.functional.ridge import pseudo_spectrum


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The sums G, P and e that fix the objective of a layer, float64; they add over samples."""

    gram: Tensor
    r""":math:`G = \sum w X X^\top`, (g, i, i)."""
    cross: Tensor
    r""":math:`P = \sum w R X^\top`, (g, o, i)."""
    energy: float
    r""":math:`e = \sum w \|R\|^2`, the objective of no update."""
    residual_gram: Tensor | None = None
    r""":math:`E = \sum w R R^\top`, (g, o, o), where it was asked for."""

    @functools.cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of G's pseudo-inverse and its eigenvectors, found once."""
        return pseudo_spectrum(self.gram)

    def objective(self, update: Tensor) -> float:
        """J of an update, (g, o, i)."""
        return float(((update @ self.gram - 2 * self.cross) * update).sum()) + self.energy

    def captured(self, update: Tensor) -> float:
        """Share of the residual energy that an update removes, ``1 - J / e``; NaN if e = 0."""
        return 1 - self.objective(update) / self.energy if self.energy > 0 else math.nan

    def minus(self, part: "Quadratic") -> "Quadratic":
        """The objective on the samples that are not in ``part``."""
        rest = None
        if self.residual_gram is not None and part.residual_gram is not None:
            rest = self.residual_gram - part.residual_gram
        return Quadratic(
            gram=self.gram - part.gram,
            cross=self.cross - part.cross,
            energy=self.energy - part.energy,
            residual_gram=rest,
        )


def weighted_sum(parts: Sequence[Quadratic], weights: Sequence[float]) -> Quadratic:
    r"""The objective :math:`\sum_t w_t J_t` of several tasks."""
    pairs = list(zip(parts, weights, strict=True))
    grams = [(q.residual_gram, w) for q, w in pairs]
    return Quadratic(
        gram=_sum((q.gram, w) for q, w in pairs),
        cross=_sum((q.cross, w) for q, w in pairs),
        energy=math.fsum(w * q.energy for q, w in pairs),
        residual_gram=None
        if any(gram is None for gram, _ in grams)
        else _sum((gram, w) for gram, w in grams if gram is not None),
    )


def same_input(
    delta: Float[Tensor, "g o i"], gram: Float[Tensor, "g i i"], *, with_residual: bool = False
) -> Quadratic:
    r"""The objective whose targets are an expert's outputs on the very inputs of the layer.

    .. math:: P_t = \Delta_t G_t, \qquad \|R_t\|^2 = \mathrm{tr}(\Delta_t G_t \Delta_t^\top)

    Args:
        delta: Task vector of the layer.
        gram: Second moments of the inputs.
        with_residual: Also :math:`E_t = \Delta_t G_t \Delta_t^\top`.
    """
    cross = delta @ gram
    return Quadratic(
        gram=gram,
        cross=cross,
        energy=max(0.0, float((cross * delta).sum())),
        residual_gram=cross @ delta.mT if with_residual else None,
    )


def damped(gram: Float[Tensor, "g i i"], off_diagonal: float) -> Float[Tensor, "g i i"]:
    r"""RegMean's :math:`a G + (1 - a)\,\mathrm{diag}(G)` (Jin et al., arXiv 2212.09849, Sec. 4)."""
    diagonal = torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    return off_diagonal * gram + (1 - off_diagonal) * diagonal


@dataclass(frozen=True, eq=False)
class System:
    r"""Least squares in coefficients: b independent problems of k rows and K unknowns, float64.

    :math:`\sum_b \mathrm{tr}(\alpha_b Q_b \alpha_b^\top) - 2\,\mathrm{tr}(\alpha_b c_b^\top) + e`
    """

    gram: Tensor
    """Q, (b, K, K)."""
    cross: Tensor
    """c, (b, k, K)."""
    energy: float
    """e."""

    def objective(self, coefficients: Tensor) -> float:
        """J of coefficients (b, k, K)."""
        value = (coefficients @ self.gram - 2 * self.cross) * coefficients
        return float(value.sum()) + self.energy

    def minus(self, part: "System") -> "System":
        """The system of the samples that are not in ``part``."""
        return System(
            gram=self.gram - part.gram,
            cross=self.cross - part.cross,
            energy=self.energy - part.energy,
        )

    @property
    def captured(self) -> float:
        r"""Share of the energy that the best coefficients remove, in [0, 1]; NaN if e = 0.

        .. math:: \rho = \mathrm{tr}(c\,Q^{+} c^\top) / e
        """
        return self.captured_with(None)

    def captured_with(self, spectrum: tuple[Tensor, Tensor] | None) -> float:
        """``captured``, where the spectrum of the Gram matrix may be known."""
        if not self.energy > 0:
            return math.nan
        removed = captured_energy(self.gram, self.cross, spectrum)
        return min(1.0, max(0.0, removed / self.energy))


def captured_energy(
    gram: Float[Tensor, "b d d"],
    cross: Float[Tensor, "b k d"],
    spectrum: tuple[Tensor, Tensor] | None = None,
) -> float:
    r""":math:`\sum_b \mathrm{tr}(c_b Q_b^{+} c_b^\top)`, never negative.

    Args:
        gram: Q.
        cross: c.
        spectrum: :func:`~lightning_merge.functional.ridge.pseudo_spectrum` of Q; found if None.
    """
    inverse, Q = pseudo_spectrum(gram) if spectrum is None else spectrum
    return float(((cross @ Q).square() * inverse[..., None, :]).sum())


def row_system(quadratic: Quadratic, elements: Float[Tensor, "e g o i"]) -> System:
    r"""One coefficient for every element and output row: g·o problems of E unknowns.

    .. math:: Q^{(r)}_{st} = \delta_{s,r} G \delta_{t,r}^\top, \qquad c^{(r)}_s = \delta_{s,r}
        P_r^\top

    Args:
        quadratic: The layer's objective.
        elements: Task vectors of the layer and any further updates.
    """
    E, g, o, _ = elements.shape
    gram = torch.einsum("agoi,bgoi->goab", elements @ quadratic.gram, elements)
    cross = torch.einsum("sgoi,goi->gos", elements, quadratic.cross)
    return System(
        gram=gram.reshape(g * o, E, E), cross=cross.reshape(g * o, 1, E), energy=quadratic.energy
    )


def summed_system(rows: System, groups: Int[Tensor, " r"] | None = None) -> System:
    """Rows that share their coefficients: all of them, or those with the same group number.

    Args:
        rows: What :func:`row_system` gives.
        groups: Number of the group of each row, from 0; None is one group, the basis ``task``.
    """
    if groups is None:
        groups = torch.zeros(len(rows.gram), dtype=torch.int64)
    groups = groups.to(rows.gram.device)
    count = int(groups.max()) + 1
    gram = rows.gram.new_zeros(count, *rows.gram.shape[1:]).index_add_(0, groups, rows.gram)
    cross = rows.cross.new_zeros(count, *rows.cross.shape[1:]).index_add_(0, groups, rows.cross)
    return System(gram=gram, cross=cross, energy=rows.energy)


def joined_system(systems: Sequence[System]) -> System:
    """Systems of one shape whose coefficients are the same: of parts of the samples, or layers."""
    return System(
        gram=torch.stack([system.gram for system in systems]).sum(0),
        cross=torch.stack([system.cross for system in systems]).sum(0),
        energy=math.fsum(system.energy for system in systems),
    )


def combine_rows(
    coefficients: Float[Tensor, "r 1 e"], elements: Float[Tensor, "e g o i"]
) -> Float[Tensor, "g o i"]:
    """The update of coefficients by row, those of :func:`row_system`."""
    _, g, o, _ = elements.shape
    return torch.einsum("goe,egoi->goi", coefficients.reshape(g, o, -1), elements)


def rotated(quadratic: Quadratic, directions: Float[Tensor, "g o r"]) -> Quadratic:
    r"""The objective in coordinates of the outputs: :math:`U^\top P`; G and e stay.

    With all o orthonormal columns this is the whole objective; with fewer, that of updates
    :math:`U M`.
    """
    return Quadratic(
        gram=quadratic.gram, cross=directions.mT @ quadratic.cross, energy=quadratic.energy
    )


def reachable(quadratic: Quadratic) -> Float[Tensor, "g o o"]:
    r""":math:`K = P G^{+} P^\top`: the residual energy that any linear update can reach."""
    half = _reachable_root(quadratic)
    return half @ half.mT


def reachable_directions(quadratic: Quadratic, rank: int) -> Float[Tensor, "g o r"]:
    r"""Leading eigenvectors of :func:`reachable`, through the smaller side of its root."""
    half = _reachable_root(quadratic)
    _, o, i = half.shape
    if rank <= i < o:
        return torch.linalg.svd(half, full_matrices=False)[0][..., :rank]
    return leading_directions(half @ half.mT, rank)


def _reachable_root(quadratic: Quadratic) -> Float[Tensor, "g o i"]:
    inverse, Q = quadratic.spectrum
    return (quadratic.cross @ Q) * inverse.sqrt()[..., None, :]


def leading_directions(matrix: Float[Tensor, "g o o"], rank: int) -> Float[Tensor, "g o r"]:
    """Orthonormal eigenvectors of the largest eigenvalues, in falling order."""
    vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)[1]
    return vectors.flip(-1)[..., :rank]


def excess(
    quadratic: Quadratic, update: Float[Tensor, "g o i"], best: Float[Tensor, "g o i"]
) -> float:
    r"""Pythagoras: :math:`J(\Delta W) - J(\Delta W^*) = \|(\Delta W - \Delta W^*) G^{1/2}\|_F^2`.

    Holds for the unconstrained optimum of a basis that contains the update.
    """
    difference = update - best
    return float(((difference @ quadratic.gram) * difference).sum())


def _sum(pairs: Iterable[tuple[Tensor, float]]) -> Tensor:
    total: Tensor | None = None
    for value, weight in pairs:
        total = weight * value if total is None else total.add_(value, alpha=weight)
    assert total is not None
    return total
