"""Warnings of corrections that are worse than none on samples left out."""

from collections.abc import Callable

import pytest
import torch

from lightning_merge.correction import ClosedFormCorrection
from lightning_merge.correction.validation import cross_validated_errors, warn_of_harm

SIZES = {"a": 60, "b": 50}


def heads_of(features):
    generator = torch.Generator().manual_seed(1)
    return {
        task: (torch.randn(4, y.shape[1], generator=generator).double(), None)
        for task, (_, y) in features.items()
    }


def test_a_correction_that_helps_is_silent(
    make_features: Callable, make_statistics: Callable, recwarn: pytest.WarningsRecorder
) -> None:
    features = make_features(SIZES)
    # One true map for both tasks: equal preference has nothing to trade.
    stretch = torch.diag(torch.arange(1.0, 7.0)).double()
    features = {task: (merged, merged @ stretch) for task, (merged, _) in features.items()}
    correction = ClosedFormCorrection(make_statistics(features), prior="procrustes", beta=1e-3)
    assert warn_of_harm(correction, heads_of(features)) == []
    assert not recwarn.list


def test_a_wrong_map_does_harm_at_both(make_features: Callable, make_statistics: Callable) -> None:
    features = make_features(SIZES)
    given = -5 * torch.eye(6, dtype=torch.float64)
    correction = ClosedFormCorrection(make_statistics(features), prior=given, beta=1e6)
    with pytest.warns(UserWarning, match=r"does harm at (equal|one-hot) preference"):
        assert warn_of_harm(correction, heads_of(features)) == ["equal", "one_hot"]


def test_tasks_that_disagree_do_harm_at_equal_only(
    make_features: Callable, make_statistics: Callable
) -> None:
    """The task with large features wins raw sums: the other is far worse off than with W = I."""
    x = make_features({"a": 60})["a"][0]
    stretch = torch.diag(torch.arange(1.0, 7.0)).double()
    features = {"a": (x, 10 * x @ stretch), "b": (x, 0.5 * x @ stretch.inverse())}
    correction = ClosedFormCorrection(
        make_statistics(features), prior="identity", beta=1e-6, task_scale="none"
    )
    with pytest.warns(UserWarning, match="does harm at equal preference"):
        assert warn_of_harm(correction, heads_of(features)) == ["equal"]


def test_too_few_samples_cannot_tell(make_features: Callable, make_statistics: Callable) -> None:
    features = make_features({"a": 1, "b": 30})
    correction = ClosedFormCorrection.paper(make_statistics(features))
    with pytest.warns(UserWarning, match="too few calibration samples"):
        assert warn_of_harm(correction, heads_of(features)) == ["unknown"]


def test_unequal_widths_have_nothing_to_compare_with(
    make_features: Callable, make_statistics: Callable
) -> None:
    features = make_features(SIZES, k=4)
    correction = ClosedFormCorrection(make_statistics(features), prior="procrustes", beta=1.0)
    assert warn_of_harm(correction, heads_of(features)) == []


def test_a_factor_of_the_features_is_no_gain(
    make_features: Callable, make_statistics: Callable
) -> None:
    """Of shrunk features a noisy map has less squared error, yet decides no better."""
    x = make_features({"a": 60})["a"][0]
    features = {"a": (x, 3 * x)}
    noisy = 2.8 * torch.eye(6, dtype=torch.float64)
    noisy[0, 1] = 0.4
    correction = ClosedFormCorrection(make_statistics(features), prior=noisy, beta=1e6)
    errors = cross_validated_errors(correction, None, heads_of(features))["a"]
    assert errors.corrected < errors.identity
    assert errors.scaled_identity == pytest.approx(0.0, abs=1e-12)
    with pytest.warns(UserWarning, match="does harm"):
        assert "one_hot" in warn_of_harm(correction, heads_of(features))
