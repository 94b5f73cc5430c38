"""Random features of several tasks, and their statistics."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from lightning_merge.correction import CorrectionStatistics

Features = dict[str, tuple[Tensor, Tensor]]


def random_features(
    sizes: Mapping[str, int], d: int = 6, k: int | None = None, seed: int = 0, noise: float = 0.3
) -> Features:
    """Per task (n, d) merged and (n, k) expert features: a perturbed map, noise and an offset."""
    k = k or d
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features = {}
    for task, n in sizes.items():
        merged = normal(n, d) + 0.5 * normal(d)
        true = torch.eye(k, d, dtype=torch.float64) + 0.4 * normal(k, d)
        features[task] = (merged, merged @ true.T + noise * normal(n, k) + 0.3 * normal(k))
    return features


def statistics_of(features: Features, **options: object) -> dict[str, CorrectionStatistics]:
    result = {}
    for task, (merged, expert) in features.items():
        result[task] = CorrectionStatistics(merged.shape[1], expert.shape[1], **options)
        result[task].update(merged, expert)
    return result


@pytest.fixture
def make_features() -> Callable[..., Features]:
    return random_features


@pytest.fixture
def make_statistics() -> Callable[..., dict[str, CorrectionStatistics]]:
    return statistics_of
