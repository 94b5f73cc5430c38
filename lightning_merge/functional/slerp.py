"""Spherical linear interpolation of two models' weights (Shoemake, SIGGRAPH 1985)."""

import math
import warnings

import torch
from jaxtyping import Float
from torch import Tensor

PARALLEL = 0.9995
"""Cosine beyond which two vectors count as parallel, where the spherical formula loses digits."""


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

    Linear interpolation where the vectors are (anti)parallel or one is zero. Angle and result are
    computed in float64, since the arccosine is ill-conditioned near one; the dtype is kept.

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
    cosine = float((a * b).sum()) / (lengths[0] * lengths[1]) if spherical else 1.0
    if cosine < -PARALLEL:
        warnings.warn(
            "slerp: two tensors point in opposite directions, so no great circle is singled out; "
            "interpolating linearly, through zero.",
            stacklevel=2,
        )
    if not spherical or abs(cosine) > PARALLEL:
        return torch.lerp(a, b, position).to(start.dtype)
    if keep_norm:
        a, b = a / lengths[0], b / lengths[1]
    angle = math.acos(cosine)
    shares = math.sin((1 - position) * angle), math.sin(position * angle)
    result = (shares[0] * a + shares[1] * b) / math.sin(angle)
    if keep_norm:
        result *= (1 - position) * lengths[0] + position * lengths[1]
    return result.to(start.dtype)
