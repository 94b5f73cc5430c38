"""The additive sums behind the statistics: their names, shapes and the check of a removal."""

from collections.abc import Mapping

import torch
from torch import Tensor

STATES = (
    "count",
    "skipped",
    "n",
    "n2",
    "gram",
    "cross",
    "energy",
    "sum_merged",
    "sum_expert",
    "expert_gram",
)


def zeros(folds: int, d: int, k: int, device: torch.device) -> dict[str, Tensor]:
    """Empty sums of F folds for widths d and k."""
    shapes = {"n": (folds,), "n2": (folds,), "gram": (folds, d, d), "cross": (folds, k, d)}
    shapes |= {"energy": (folds,), "sum_merged": (folds, d), "sum_expert": (folds, k)}
    shapes |= {"expert_gram": (k, k)}
    counts = {
        "count": torch.zeros(folds, dtype=torch.int64, device=device),
        "skipped": torch.zeros((), dtype=torch.int64, device=device),
    }
    sums = {
        name: torch.zeros(shape, dtype=torch.float64, device=device)
        for name, shape in shapes.items()
    }
    return counts | sums


def check_removal(left: Mapping[str, Tensor], before: Mapping[str, Tensor], empty: Tensor) -> None:
    """Raise a ``ValueError`` unless what is left could be the sums of some samples.

    Args:
        left: Sums after a removal.
        before: Sums before it.
        empty: Folds that have no samples left, bool (F,).
    """
    reasons = []
    if bool((left["count"] < 0).any()):
        reasons.append(f"sample counts would be {left['count'].tolist()}")
    if bool((left["n"] < -1e-12 * before["n"]).any()):
        reasons.append(f"sums of weights would be {left['n'].tolist()}")
    # Rounding of the sums before the removal stays in what is left of them.
    traces = before["gram"].diagonal(dim1=-2, dim2=-1).sum(-1)
    values = torch.linalg.eigvalsh((left["gram"] + left["gram"].mT) / 2)
    negative = values[:, 0] < -1e-10 * values[:, -1].clamp_min(0) - 1e-13 * traces
    remainder = empty & (values.abs().amax(-1) > 1e-10 * traces)
    if bool((negative | remainder).any()):
        reasons.append("the remaining second moments are not those of any samples")
    if reasons:
        raise ValueError(
            f"cannot remove these statistics: {'; '.join(reasons)}. Only samples that were added "
            "before can be taken out."
        )
