"""TALL masks and consensus (Wang et al., ICML 2024, arXiv:2405.07813)."""

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor


def tall_masks(
    task_vectors: Float[Tensor, "experts *shape"],
    merged: Float[Tensor, "*shape"],
    thresholds: Float[Tensor, " experts"],
) -> Bool[Tensor, "experts *shape"]:
    r"""Entries that matter to each task (Equation 3).

    .. math:: m_t = 1\{\,|\tau_t| > \kappa_t\,|\tau_m - \tau_t|\,\}

    Args:
        task_vectors: Task vectors of one parameter; a zero entry is never active.
        merged: The multi-task vector :math:`\tau_m`: their sum, or what TIES makes of them.
        thresholds: :math:`\kappa_t >= 0`, dimensionless: larger is sparser.
    """
    kappa = thresholds.to(task_vectors).view(-1, *[1] * merged.ndim)
    return task_vectors.abs() > kappa * (merged - task_vectors).abs()


def consensus(
    task_vectors: Float[Tensor, "experts *shape"],
    merged: Float[Tensor, "*shape"],
    thresholds: Float[Tensor, " experts"],
    min_active: int,
) -> Float[Tensor, "*shape"]:
    """Keep the entries of the multi-task vector that matter to enough tasks (Section 4).

    Args:
        task_vectors: As in :func:`tall_masks`, like the next two.
        merged: The multi-task vector.
        thresholds: One for each task.
        min_active: How many tasks must need an entry: 0 keeps all, more than T none.

    Example:
        >>> task_vectors = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
        >>> consensus(task_vectors, task_vectors.sum(0), torch.tensor([0.4, 0.4]), min_active=2)
        tensor([2., 0.])
    """
    active = tall_masks(task_vectors, merged, thresholds).sum(dim=0)
    return torch.where(active >= min_active, merged, 0.0)


def pack_mask(mask: Bool[Tensor, "*shape"]) -> UInt8[Tensor, " bytes"]:
    """A mask as bits, eight entries in a byte, the first entry in the highest bit."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack_mask(packed: UInt8[Tensor, " bytes"], shape: tuple[int, ...]) -> Bool[Tensor, "..."]:
    """The mask of this shape that :func:`pack_mask` packed."""
    bits = np.unpackbits(packed.numpy(), count=int(np.prod(shape, dtype=np.int64)))
    return torch.from_numpy(bits.astype(bool)).view(shape)
