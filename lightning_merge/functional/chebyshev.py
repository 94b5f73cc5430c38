"""Preferences that ask for exact ratios of losses: the weighted Chebyshev problem."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def chebyshev_weights(
    preference: Float[Tensor, " t"],
    gaps: Float[Tensor, " t"],
    excess: Callable[[Tensor], Tensor],
    *,
    tolerance: float = 1e-6,
    max_steps: int = 5000,
) -> tuple[Float[Tensor, " t"], float]:
    r"""Weights of the linear mixture that solves :math:`\min_W \max_t p_t \ell_t(W)`.

    With :math:`\ell_t = (L_t(W) - L_t(W_t)) / g_t`, duality makes it
    :math:`\max_{q \in \Delta} \sum_t q_t p_t \ell_t(W_w)` with :math:`w_t = q_t p_t / g_t`, whose
    gradient is :math:`v_t = p_t \ell_t`. Multiplicative steps
    :math:`q_t \leftarrow q_t (v_t / \max v)^{1/2}` rise to it; the duality gap
    :math:`\max v - \sum q_t v_t` certifies the result.

    Args:
        preference: Positive, one a task.
        gaps: :math:`g_t > 0`, the range of each loss.
        excess: Losses above their best, (T,), of the mixture with given weights (T,).
        tolerance: Largest gap, relative to ``max v``.
        max_steps: Largest number of mixtures solved.

    Returns:
        The weights w, and the certified relative gap.

    Raises:
        ValueError: If the gap is not reached.
    """
    q = torch.full_like(preference, 1 / len(preference))
    gap = torch.inf
    for _ in range(max_steps):
        weights = q * preference / gaps
        v = (preference * excess(weights) / gaps).clamp_min(0)
        top = float(v.max())
        # Below this, every task has its own optimum up to rounding.
        if top <= 1e-13:
            return weights, 0.0
        gap = (top - float(q @ v)) / top
        if gap <= tolerance:
            return weights, max(gap, 0.0)
        q = q * (v / top).sqrt()
        # A task without weight could never return; the floor is far below the tolerance.
        q = (q / q.sum()).clamp_min(1e-12)
        q = q / q.sum()
    raise ValueError(
        f"the Chebyshev preference was not solved in {max_steps} steps: relative gap {gap:.1e}, "
        f"asked {tolerance:.1e}. Use scalarization='linear'."
    )
