"""DARE: drop entries at random and rescale the rest (Yu et al., ICML 2024, arXiv:2311.03099)."""

import hashlib
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from lightning_merge.functional.parallel import PerThread

Rescale: TypeAlias = Literal["inverse", "none", "l1", "l2"]


WORDS = 1 << 17
"""Words of one generator; any part of a parameter can be drawn without those before it."""


def random_words(
    seed: int, task: str, name: str, size: int, start: int = 0
) -> Int32[Tensor, " size"]:
    """Uniform 32-bit integers that depend on the seed, the task and the parameter alone.

    Neither the order of parameters nor the device or the global generators have a part in them.

    Args:
        seed: Seed of the masks.
        task: The expert.
        name: The parameter.
        size: How many words.
        start: Entry of the parameter that the first word belongs to.
    """
    words, stop = np.empty(size, np.int32), start + size
    for block in range(start // WORDS, -(-stop // WORDS)):
        first, last = max(start, block * WORDS), min(stop, (block + 1) * WORDS)
        raw = _generator(seed, task, name, block).random_raw((last - block * WORDS + 1) // 2)
        part = raw.view(np.int32)[first - block * WORDS : last - block * WORDS]
        words[first - start : last - start] = part
    return torch.from_numpy(words)


_generators = PerThread(np.random.SFC64)


def _generator(seed: int, task: str, name: str, block: int) -> np.random.SFC64:
    """This thread's generator, begun anew: in a tenth of the time that a new one takes."""
    digest = hashlib.sha256(f"{seed}\0{task}\0{name}\0{block}".encode()).digest()
    generator = _generators.get()
    # all 256 bits of the state: what a seed's mixing is for, the digest has done
    state: Any = {"state": np.frombuffer(digest, dtype="<u8").astype(np.uint64)}
    generator.state = {"bit_generator": "SFC64", "state": state, "has_uint32": 0, "uinteger": 0}
    return generator


def bernoulli(
    probability: Float[Tensor, " size"] | float, words: Int32[Tensor, " size"]
) -> Bool[Tensor, " size"]:
    """Draw independent events of the given probability, exact to 2^-32 (2^-24 for a tensor)."""
    if not isinstance(probability, float):
        return words.to(torch.float32) * 2.0**-32 + 0.5 <= probability
    if probability >= 1:
        return torch.ones_like(words, dtype=torch.bool)
    limit = round(probability * 2**32) - 2**31
    # NumPy compares ten times as fast as torch does on the CPU, and the words are drawn there
    return words < limit if words.is_cuda else torch.from_numpy(words.numpy() < np.int32(limit))


def drop(values: Float[Tensor, "*shape"], kept: Bool[Tensor, "*shape"]) -> None:
    """Zero, in place, what is not kept; NaN and infinity become NaN, so that they are seen."""
    if values.is_cuda:
        values.mul_(kept)
    else:  # NumPy multiplies by booleans four times as fast as torch does on the CPU
        with np.errstate(invalid="ignore"):
            np.multiply(values.numpy(), kept.numpy(), out=values.numpy())


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
    dropped = task_vector.clone()
    drop(dropped, kept)
    dropped.add_(0.0)  # a dropped negative entry is -0, which adding 0 makes 0
    if rescale == "inverse":
        return dropped.div_(probability)
    if rescale == "none" or not bool(dropped.any()):
        return dropped
    order = 1 if rescale == "l1" else 2
    norms = [
        torch.linalg.vector_norm(v, order, dtype=torch.float64) for v in (task_vector, dropped)
    ]
    return dropped * (norms[0] / norms[1]).to(dropped.dtype)
