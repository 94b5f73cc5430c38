"""DARE: drop entries at random and rescale the rest (Yu et al., ICML 2024, arXiv:2311.03099)."""

import hashlib
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

Rescale: TypeAlias = Literal["inverse", "none", "l1", "l2"]


def random_words(seed: int, task: str, name: str, size: int) -> Int32[Tensor, " size"]:
    """Uniform 32-bit integers that depend on the seed, the task and the parameter alone.

    Neither the order of parameters nor the device or the global generators have a part in them.
    """
    digest = hashlib.sha256(f"{seed}\0{task}\0{name}".encode()).digest()
    words = np.frombuffer(digest, dtype=np.uint32)
    generator = np.random.SFC64(np.random.SeedSequence(words.tolist()))
    return torch.from_numpy(generator.random_raw((size + 1) // 2).view(np.int32)[:size])


def bernoulli(
    probability: Float[Tensor, " size"] | float, words: Int32[Tensor, " size"]
) -> Bool[Tensor, " size"]:
    """Draw independent events of the given probability, exact to 2^-32 (2^-24 for a tensor)."""
    if isinstance(probability, float):
        return words < round(probability * 2**32) - 2**31 if probability < 1 else words == words
    return words.to(torch.float32) * 2.0**-32 + 0.5 <= probability


def drop_and_rescale(
    task_vector: Float[Tensor, "*shape"],
    kept: Bool[Tensor, "*shape"],
    probability: Float[Tensor, "*shape"] | float,
    rescale: Rescale = "inverse",
) -> Float[Tensor, "*shape"]:
    r"""Zero what is not kept, and rescale the rest.

    .. math:: \hat\tau_j = m_j\,\tau_j / p_j,\quad E\,\hat\tau = \tau

    Args:
        task_vector: One expert's task vector of one parameter.
        kept: The entries :math:`m` to keep.
        probability: The probability :math:`p` that an entry is kept, in (0, 1].
        rescale: ``inverse`` divides by the probability (the paper, unbiased); ``l1`` and ``l2``
            bring the kept tensor back to its former norm; ``none`` does nothing.

    Example:
        >>> drop_and_rescale(torch.tensor([1.0, -3.0]), torch.tensor([False, True]), 0.5, "l1")
        tensor([ 0., -4.])
    """
    # where, not a product: a dropped negative entry gives 0, not -0
    dropped = torch.where(kept, task_vector, 0.0)
    if rescale == "inverse":
        return dropped / probability
    if rescale == "none" or not bool(dropped.any()):
        return dropped
    order = 1 if rescale == "l1" else 2
    norms = [
        torch.linalg.vector_norm(v, order, dtype=torch.float64) for v in (task_vector, dropped)
    ]
    return dropped * (norms[0] / norms[1]).to(dropped.dtype)
