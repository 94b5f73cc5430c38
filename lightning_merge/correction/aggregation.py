"""Two simpler ways to mix the maps of the tasks, for comparison."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_merge.functional.procrustes import orthogonal_factor


def averaged_maps(own: Sequence[Tensor], preferences: Tensor) -> Tensor:
    r"""Plain average :math:`\sum_t p_t W_t`, (P, k, d): blind to where each task has its data."""
    maps = torch.stack(list(own))
    return torch.einsum("pt,tkd->pkd", preferences.to(maps), maps)


def polar_averaged_maps(own: Sequence[Tensor], preferences: Tensor) -> Tensor:
    r"""Rotations and stretches averaged apart, (P, k, d).

    With :math:`W_t = U_t P_t`, :math:`P_t = (W_t^\top W_t)^{1/2}`, the map is
    :math:`\mathrm{polar}(\sum p_t U_t) \sum p_t P_t`.
    """
    rotations, stretches = [], []
    for W in own:
        _, S, Vh = torch.linalg.svd(W, full_matrices=False)
        rotations.append(orthogonal_factor(W))
        stretches.append(Vh.T @ (S[:, None] * Vh))
    turned = averaged_maps(rotations, preferences)
    stretched = averaged_maps(stretches, preferences)
    return torch.stack([orthogonal_factor(U) @ P for U, P in zip(turned, stretched, strict=True)])
