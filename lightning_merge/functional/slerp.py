"""Spherical linear interpolation of two models' weights (Shoemake, SIGGRAPH 1985)."""

import math
import warnings

import torch
from jaxtyping import Float
from torch import Tensor

OPPOSITE = -0.9995
"""Cosine below which no great circle is singled out."""


def slerp(
    start: Float[Tensor, "*shape"],
    end: Float[Tensor, "*shape"],
    position: float,
    *,
    keep_norm: bool = False,
) -> Float[Tensor, "*shape"]:
    r"""Interpolate along the great circle between two tensors.

    .. math:: s(t) = \frac{\sin((1-t)\,\omega)\,a + \sin(t\,\omega)\,b}{\sin\omega},\quad
        \omega = \arccos\frac{\langle a, b\rangle}{\|a\|\,\|b\|}

    Linear interpolation where the vectors are opposite or one is zero. The angle comes from the
    chords :math:`\|u - v\|` and :math:`\|u + v\|` of the unit vectors, which is exact for small
    angles where the arccosine loses half its digits; so nearly parallel vectors need no rule of
    their own (other implementations jump to linear interpolation at a cosine of 0.9995, by up to
    1.25e-4). Everything is computed in float64; the dtype is kept.

    Args:
        start: Value :math:`a` at position 0, returned as such there.
        end: Value :math:`b` at position 1.
        position: Where to stop, in [0, 1].
        keep_norm: Interpolate the norm on its own, linearly: the result then has norm
            ``(1 - t)‖a‖ + t‖b‖``.

    Example:
        >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
        tensor([0.7071, 0.7071])
    """
    if position in (0.0, 1.0):
        return (end if position else start).clone()
    a, b = start.double(), end.double()
    lengths = float(a.norm()), float(b.norm())
    spherical = min(lengths) >= 1e-8
    if not spherical:
        return torch.lerp(a, b, position).to(start.dtype)
    u, v = a / lengths[0], b / lengths[1]
    angle = 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))
    if math.cos(angle) < OPPOSITE:
        warnings.warn(
            "slerp: two tensors point in opposite directions, so no great circle is singled out; "
            "interpolating linearly, through zero.",
            stacklevel=2,
        )
        return torch.lerp(a, b, position).to(start.dtype)
    if keep_norm:
        a, b = u, v
    result = _share(1 - position, angle) * a + _share(position, angle) * b
    if keep_norm:
        result *= (1 - position) * lengths[0] + position * lengths[1]
    return result.to(start.dtype)


def _share(position: float, angle: float) -> float:
    """``sin(position * angle) / sin(angle)``, which is the position itself at angle zero."""
    return math.sin(position * angle) / math.sin(angle) if angle > 0 else position
