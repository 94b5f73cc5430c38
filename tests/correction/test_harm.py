"""Warnings of corrections that are worse than none on samples left out."""

from collections.abc import Callable

import pytest
import torch

from lightning_merge.correction import ClosedFormCorrection, HeadMetric
from lightning_merge.correction.validation import cross_validated_errors, warn_of_harm
from lightning_merge.functional.sums import fold_of

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


def one_row(heads):
    return {task: (weight[:1], None) for task, (weight, _) in heads.items()}


def test_a_shrunk_map_is_judged_by_its_direction_where_logits_compete(
    make_features: Callable, make_statistics: Callable, recwarn: pytest.WarningsRecorder
) -> None:
    """The right map, tenfold too small, loses no decision; as a regression it is nearly useless."""
    x = make_features({"a": 60})["a"][0]
    stretch = torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 1.5])).double()
    features = {"a": (x, x @ stretch)}
    correction = ClosedFormCorrection(make_statistics(features), prior=0.1 * stretch, beta=1e9)
    heads = heads_of(features)
    errors = cross_validated_errors(correction, None, heads)["a"]
    assert errors.corrected > errors.identity
    assert errors.scaled == pytest.approx(0.0, abs=1e-9)
    assert warn_of_harm(correction, heads) == []
    assert not recwarn.list
    with pytest.warns(UserWarning, match="does harm"):
        assert warn_of_harm(correction, one_row(heads)) == ["equal", "one_hot"]


def test_heads_that_are_not_centred_are_judged_by_scale(
    make_features: Callable, make_statistics: Callable, recwarn: pytest.WarningsRecorder
) -> None:
    x = make_features({"a": 60})["a"][0]
    features = {"a": (x, 3 * x)}
    noisy = 2.8 * torch.eye(6, dtype=torch.float64)
    noisy[0, 1] = 0.4
    heads = heads_of(features)
    options = {"prior": noisy, "beta": 1e6, "head": HeadMetric(centre=False)}
    correction = ClosedFormCorrection(make_statistics(features), **options)
    assert warn_of_harm(correction, heads) == []
    assert warn_of_harm(correction, one_row(heads)) == []
    assert not recwarn.list


def test_errors_up_to_a_factor_are_those_of_the_best_one(
    make_features: Callable, make_statistics: Callable
) -> None:
    """Against refitting on the features of each fold."""
    features = make_features({"a": 30})
    Z, Y = features["a"]
    correction = ClosedFormCorrection(
        make_statistics(features), beta=0.5, prior="identity", bias="per_task"
    )
    H = heads_of(features)["a"][0]
    H = H - H.mean(0)
    fold, images = fold_of(torch.arange(30), 5), torch.zeros(30, 4).double()
    for f in range(5):
        z, y = Z[fold != f], Y[fold != f]
        m, i = z.mean(0), y.mean(0)
        G = (z - m).T @ (z - m)
        ridge = 0.5 * float(G.trace()) / 6 * torch.eye(6).double()
        W = ((y - i).T @ (z - m) + ridge) @ torch.linalg.inv(G + ridge)
        images[fold == f] = ((Z[fold == f] - m) @ W.T + i) @ H.T
    error = cross_validated_errors(correction, None, heads_of(features))["a"]
    read = Y @ H.T
    variance = (read - read.mean(0)).square().sum()
    for found, image in ((error.scaled, images), (error.scaled_identity, Z @ H.T)):
        factor = (image * read).sum() / image.square().sum()
        assert found == pytest.approx(float((factor * image - read).square().sum() / variance))
    assert error.corrected == pytest.approx(float((images - read).square().sum() / variance))
