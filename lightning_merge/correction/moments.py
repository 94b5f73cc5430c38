"""Second moments of one task, and the errors of a linear map computed from them."""

from dataclasses import dataclass

import torch
from torch import Tensor

CANCELLATION = 1e-8
"""Centred moments lose their digits when the mean holds all but this share of the energy."""


@dataclass(frozen=True)
class Moments:
    r"""Sums over samples with merged features z (d) and expert features y (k), all float64."""

    count: int
    """Samples seen."""
    n: float
    """Sum of the sample weights."""
    gram: Tensor
    """:math:`G = \\sum \\omega z z^\\top`, (d, d)."""
    cross: Tensor
    """:math:`A = \\sum \\omega y z^\\top`, (k, d)."""
    energy: float
    """:math:`e = \\sum \\omega \\|y\\|^2`."""
    sum_merged: Tensor
    """:math:`\\sum \\omega z`, (d,)."""
    sum_expert: Tensor
    """:math:`\\sum \\omega y`, (k,)."""
    expert_gram: Tensor | None = None
    """:math:`\\sum \\omega y y^\\top`, (k, k); None for one fold."""

    @property
    def mean_merged(self) -> Tensor:
        """Weighted mean of the merged features, (d,)."""
        return self.sum_merged / self.n

    @property
    def mean_expert(self) -> Tensor:
        """Weighted mean of the expert features, (k,)."""
        return self.sum_expert / self.n

    @property
    def cancels(self) -> bool:
        """Whether centring would lose the digits of the merged features."""
        mean_energy = float(self.sum_merged @ self.sum_merged) / self.n
        return mean_energy > (1 - CANCELLATION) * float(self.gram.trace())

    def without(self, part: "Moments") -> "Moments":
        """Moments of the samples that are not in ``part``."""
        return Moments(
            count=self.count - part.count,
            n=self.n - part.n,
            gram=self.gram - part.gram,
            cross=self.cross - part.cross,
            energy=self.energy - part.energy,
            sum_merged=self.sum_merged - part.sum_merged,
            sum_expert=self.sum_expert - part.sum_expert,
        )

    def shifted(self, merged: Tensor, expert: Tensor) -> "Moments":
        """Moments of ``z - merged`` and ``y - expert``, for fixed vectors (d,) and (k,)."""
        sm, si, n = self.sum_merged, self.sum_expert, self.n
        crossed = torch.outer(sm, merged)
        grown = torch.outer(si, expert)
        expert_gram = self.expert_gram
        if expert_gram is not None:
            expert_gram = expert_gram - grown - grown.T + n * torch.outer(expert, expert)
        return Moments(
            count=self.count,
            n=n,
            gram=self.gram - crossed - crossed.T + n * torch.outer(merged, merged),
            cross=self.cross
            - torch.outer(si, merged)
            - torch.outer(expert, sm)
            + n * torch.outer(expert, merged),
            energy=self.energy - 2 * float(si @ expert) + n * float(expert @ expert),
            sum_merged=sm - n * merged,
            sum_expert=si - n * expert,
            expert_gram=expert_gram,
        )

    def centred(self) -> "Moments":
        """Moments about the means of these very samples."""
        return self.shifted(self.mean_merged, self.mean_expert)

    def read_by(self, head: Tensor | None) -> "Moments":
        """Moments of ``head @ y`` in place of y, with head (K, k); None changes nothing.

        Without ``expert_gram`` the energy of what the head reads is unknown and counts 0: errors
        are then right up to a constant that no map changes.
        """
        if head is None:
            return self
        gram = None if self.expert_gram is None else head @ self.expert_gram @ head.T
        return Moments(
            count=self.count,
            n=self.n,
            gram=self.gram,
            cross=head @ self.cross,
            energy=0.0 if gram is None else float(gram.trace()),
            sum_merged=self.sum_merged,
            sum_expert=head @ self.sum_expert,
            expert_gram=gram,
        )

    def error(self, weight: Tensor, bias: Tensor | None = None) -> float:
        r"""Squared error :math:`\sum \omega \|W z + b - y\|^2` of a map (k, d), (k,)."""
        energy, common = self.image(weight, bias)
        return energy - 2 * common + self.energy

    def image(self, weight: Tensor, bias: Tensor | None = None) -> tuple[float, float]:
        r"""Energy :math:`\sum \omega \|W z + b\|^2` and :math:`\sum \omega (W z + b)^\top y`."""
        energy = float(((weight @ self.gram) * weight).sum())
        common = float((self.cross * weight).sum())
        if bias is None:
            return energy, common
        energy += 2 * float(bias @ (weight @ self.sum_merged)) + self.n * float(bias @ bias)
        return energy, common + float(bias @ self.sum_expert)
