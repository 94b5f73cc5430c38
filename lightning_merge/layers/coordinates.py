r"""Wide layers seen through the outputs of given matrices: coordinates in place of inputs.

An update that combines given matrices, :math:`\Delta W_r = \sum_e \alpha_{re} F_{e,r}` for every
output row r, is least squares on the outputs :math:`F_{e,r} x`. A layer of shape (g, o, i) is then
one of shape (g·o, 1, E) on these E columns, and no i x i matrix of second moments is made.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_merge.layers.sites import Site
from lightning_merge.layers.statistics import Picked

WORKSPACE = 64 * 2**20
"""Bytes that columns and their outputs may take at a time."""


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Named matrices of one layer, whose combinations are written as their coefficients."""

    site: Site
    shape: tuple[int, int, int]
    """(g, o, i) of the layer's matrix."""
    names: tuple[str, ...]
    """Of the E matrices, in their order."""
    matrix_of: Callable[[Site, str], Tensor]
    """Gives a matrix (g, o, i) by its name, float64, on the CPU."""

    @property
    def seen_shape(self) -> tuple[int, int, int]:
        """Shape (g·o, 1, E) of the layer in these coordinates."""
        g, o, _ = self.shape
        return g * o, 1, len(self.names)

    def one(self, name: str) -> Tensor:
        """Coefficients (g·o, 1, E) of one matrix.

        Raises:
            ValueError: If it is none of the named.
        """
        if name not in self.names:
            raise ValueError(
                f"layer '{self.site.name}' has more than max_inputs inputs, and its statistics "
                f"hold no outputs of {name}, only of {', '.join(self.names)}. Collect them anew "
                "with these heuristics and this fallback."
            )
        found = torch.zeros(self.seen_shape, dtype=torch.float64)
        found[..., self.names.index(name)] = 1
        return found

    def lifted(self, coefficients: Tensor) -> Tensor:
        """The matrix (g, o, i) of coefficients (g·o, 1, E)."""
        g, o, _ = self.shape
        total = torch.zeros(self.shape, dtype=torch.float64)
        for name, column in zip(self.names, coefficients.unbind(-1), strict=True):
            if bool(column.any()):
                total += column.reshape(g, o, 1) * self.matrix_of(self.site, name)
        return total

    def stacked(self) -> Tensor:
        """All matrices, (E, g, o, i)."""
        return torch.stack([self.matrix_of(self.site, name) for name in self.names])

    def pieces(self, picked: Picked) -> Iterator[Picked]:
        """The picked columns in parts, each of which fits in :data:`WORKSPACE`."""
        g, o, i = self.shape
        # Columns of two networks as given and in float64; outputs, two copies and their products.
        entries = 4 * g * i + g * o * (4 * len(self.names) + 4)
        size = max(1, WORKSPACE // (8 * entries))
        places = picked.keep.nonzero()[:, 0]
        for start in range(0, len(places), size):
            part = slice(start, start + size)
            keep = torch.zeros_like(picked.keep)
            keep[places[part]] = True
            yield Picked(keep=keep, folds=picked.folds[part], weights=picked.weights[part])


def outputs(matrices: Tensor, columns: Tensor) -> Tensor:
    """Outputs (g·o, m, E) of matrices (E, g, o, i) on columns (g, m, i): the columns of a row."""
    count, g, o, _ = matrices.shape
    with torch.autocast(columns.device.type, enabled=False):
        return torch.einsum("egoi,gmi->gome", matrices, columns).reshape(g * o, -1, count)


def by_row(values: Tensor) -> Tensor:
    """Residuals or targets (g, m, o) of the rows as problems side by side, (g·o, m, 1)."""
    return values.mT.flatten(0, 1)[..., None]
