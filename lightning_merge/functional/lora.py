"""Low-rank experts by their factors, without the dense product."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_merge.functional.spectral import Factors


def lora_factors(
    up: Float[Tensor, "m rank"], down: Float[Tensor, "rank n"], rank_tol: float = 1e-5
) -> Factors:
    r"""Singular triplets of the update :math:`BA` by the QR route, in O((m + n) rank²).

    .. math:: B = Q_B R_B,\; A^\top = Q_A R_A,\quad R_B R_A^\top = U'SV'^\top,\quad U = Q_B U'

    Args:
        up: :math:`B`, with the adapter's scaling multiplied in.
        down: :math:`A`.
        rank_tol: Singular values up to this fraction of the largest are left out.
    """
    left_basis, left_core = torch.linalg.qr(up.double())
    right_basis, right_core = torch.linalg.qr(down.double().t())
    left, values, right = torch.linalg.svd(left_core @ right_core.t(), full_matrices=False)
    live = values > rank_tol * values[:1]
    return Factors(left_basis @ left[:, live], values[live], right[live] @ right_basis.t())


def sum_factors(
    ups: Sequence[Float[Tensor, "m _"]],
    downs: Sequence[Float[Tensor, "_ n"]],
    rank_tol: float = 1e-5,
) -> Factors:
    """Singular triplets of the sum of low-rank updates: their factors side by side."""
    return lora_factors(torch.cat(list(ups), dim=1), torch.cat(list(downs), dim=0), rank_tol)


def sum_of_products(
    ups: Sequence[Float[Tensor, "m _"]],
    downs: Sequence[Float[Tensor, "_ n"]],
    weights: Sequence[float],
) -> Float[Tensor, "m n"]:
    r"""The sum :math:`\sum_t w_t B_t A_t` as one product, in float64."""
    scaled = [up.double() * weight for up, weight in zip(ups, weights, strict=True)]
    return torch.cat(scaled, dim=1) @ torch.cat(list(downs), dim=0).double()
