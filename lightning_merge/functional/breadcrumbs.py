"""Model Breadcrumbs: mask outliers and noise (Davari and Belilovsky, 2023, arXiv:2312.06795)."""

from functools import partial

from jaxtyping import Float
from torch import Tensor

from lightning_merge.functional.selection import largest
from lightning_merge.functional.ties import trim_by


def breadcrumbs(
    task_vector: Float[Tensor, "*shape"], density: float, drop_top: float
) -> Float[Tensor, "*shape"]:
    """Keep the entries of middle magnitude: below the largest, above the many small ones.

    Exactly ``round(density * n)`` entries stay, at least one; of the largest
    ``round(drop_top * n)`` are dropped, or fewer where the rest would not fill the density. Equal
    magnitudes rank by index, the earlier one as the larger.

    Args:
        task_vector: One expert's task vector of one parameter, ranked on its own.
        density: Fraction of the entries kept, in (0, 1].
        drop_top: Fraction of the largest entries dropped, in [0, 1).

    Example:
        >>> import torch
        >>> breadcrumbs(torch.tensor([1.0, -9.0, 3.0, -2.0]), density=0.5, drop_top=0.25)
        tensor([ 0.,  0.,  3., -2.])
    """
    flat = task_vector.reshape(-1)
    first, last = kept_ranks(len(flat), density, drop_top)
    kept = _largest(flat, len(flat) - first)
    if last < len(flat):
        kept -= _largest(flat, len(flat) - last)
    return kept.view(task_vector.shape)


def _largest(flat: Tensor, kept: int) -> Tensor:
    cut = largest(partial(list, (flat,)), len(flat), kept)
    return trim_by(flat, cut.threshold, cut.ties[0])[0]


def kept_ranks(size: int, density: float, drop_top: float) -> tuple[int, int]:
    """Ascending ranks of magnitude that stay: from the first to before the last.

    Example:
        >>> kept_ranks(10, 0.5, 0.1), kept_ranks(10, 1.0, 0.1), kept_ranks(3, 0.1, 0.01)
        ((4, 9), (0, 10), (2, 3))
    """
    kept = min(size, max(1, round(density * size)))
    top = min(round(drop_top * size), size - kept)
    return size - top - kept, size - top
