"""Bases of updates: how each turns a layer's objective into least squares in coefficients."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_merge.functional.projection import (
    Quadratic,
    System,
    combine_rows,
    leading_directions,
    reachable_directions,
    rotated,
    row_system,
    summed_system,
)

BasisName: TypeAlias = Literal[
    "task", "task_global", "row", "rotated_row", "block", "subspace", "span", "full"
]
Directions: TypeAlias = Literal["residual", "reachable", "identity"]
FREE = ("full", "subspace")
"""Bases of free matrices, whose unknowns are no coefficients of given updates."""
GIVEN = ("task", "task_global", "row", "block", "span")
"""Bases whose updates have, in every row of the outputs, only the rows of given updates."""


@dataclass(frozen=True, eq=False)
class Basis:
    """One basis of updates of one layer."""

    name: BasisName
    elements: Tensor
    """Given updates, (E, g, o, i)."""
    frame: Tensor | None = None
    """Directions U of the outputs, (g, o, r)."""
    blocks: Tensor | None = None
    """Number of the block of each of the g·o rows."""

    def system(self, quadratic: Quadratic, rows: System | None = None) -> System:
        """The objective as least squares in the coefficients.

        Args:
            quadratic: The objective.
            rows: Its :func:`row_system` with the elements, where it is known; of use to ``task``,
                ``block`` and ``row``.
        """
        if self.name == "full":
            return System(quadratic.gram, quadratic.cross, quadratic.energy)
        if self.frame is not None:
            quadratic = rotated(quadratic, self.frame)
            if self.name == "subspace":
                return System(quadratic.gram, quadratic.cross, quadratic.energy)
        if rows is None or self.frame is not None:
            rows = row_system(quadratic, self._turned)
        if self.name in ("row", "rotated_row"):
            return rows
        return summed_system(rows, self.blocks)

    def update(self, coefficients: Tensor) -> Tensor:
        """The update (g, o, i) of coefficients."""
        if self.name == "full":
            return coefficients
        if self.name == "subspace":
            assert self.frame is not None
            return self.frame @ coefficients
        if self.name in ("row", "rotated_row"):
            turned = combine_rows(coefficients, self._turned)
            return turned if self.frame is None else self.frame @ turned
        _, g, o, _ = self.elements.shape
        if self.blocks is None:
            return combine_rows(coefficients.expand(g * o, 1, -1), self.elements)
        return combine_rows(coefficients[self.blocks], self.elements)

    def start(self, update: Tensor, weights: Tensor) -> Tensor:
        """Coefficients that a ridge pulls towards.

        Args:
            update: For free matrices: the update, of which the reachable part is taken.
            weights: For the others: one coefficient for every element, (E,).
        """
        if self.name == "full":
            return update
        if self.name == "subspace":
            assert self.frame is not None
            return self.frame.mT @ update
        _, g, o, _ = self.elements.shape
        count = g * o if self.name in ("row", "rotated_row") else 1
        if self.blocks is not None:
            count = int(self.blocks.max()) + 1
        return weights.expand(count, 1, -1).clone()

    @property
    def is_plain(self) -> bool:
        """Whether coefficients multiply rows of the elements as they are given."""
        return self.name not in FREE and self.frame is None

    @property
    def _turned(self) -> Tensor:
        return self.elements if self.frame is None else self.frame.mT @ self.elements


def make_basis(
    name: BasisName,
    quadratic: Quadratic,
    elements: Tensor,
    *,
    directions: Directions = "residual",
    rank: int | None = None,
    num_blocks: int = 8,
) -> Basis:
    """The basis of one layer; only ``rotated_row`` and ``subspace`` look at the objective.

    Args:
        name: See ``OutputProjection``.
        quadratic: The objective of the training samples.
        elements: Given updates, (E, g, o, i).
        directions: What the outputs are rotated to.
        rank: Directions of ``subspace``; None is a quarter of the outputs.
        num_blocks: Blocks of consecutive rows for ``block``.
    """
    _, g, o, _ = elements.shape
    if name == "block":
        blocks = torch.arange(g * o, device=elements.device) * min(num_blocks, g * o) // (g * o)
        return Basis(name, elements, blocks=blocks)
    if name == "rotated_row":
        return Basis(name, elements, frame=_frame(quadratic, directions, o))
    if name == "subspace":
        size = max(1, o // 4) if rank is None else min(rank, o)
        return Basis(name, elements, frame=_frame(quadratic, directions, size))
    return Basis(name, elements)


def _frame(quadratic: Quadratic, directions: Directions, rank: int) -> Tensor:
    g, o, _ = quadratic.cross.shape
    if directions == "identity":
        return torch.eye(o).to(quadratic.cross)[:, :rank].expand(g, o, rank)
    if directions == "reachable":
        return reachable_directions(quadratic, rank)
    if quadratic.residual_gram is None:
        raise ValueError(
            "directions='residual' needs the second moments of the residuals: collect the "
            "statistics with them, or choose directions='reachable'."
        )
    return leading_directions(quadratic.residual_gram, rank)
