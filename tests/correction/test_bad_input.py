"""Bad input, row by row of the specification, and where each reaction is held.

| input | held by |
| --- | --- |
| preference with NaN, infinity, negative entry, wrong length, all zero | ``test_preferences`` |
| sum other than one; ``strict`` | ``test_a_sum_other_than_one`` |
| unknown task; task left out | ``test_unknown_and_missing_tasks`` |
| positive preference, no samples | ``test_closed_form.py::test_empty_tasks`` |
| non-finite features; ``on_nonfinite`` | ``test_statistics.py::test_nonfinite_features`` |
| rows differ, width changes, k clashes | ``test_statistics.py::test_bad_shapes_and_types``, \
``test_closed_form.py::test_unequal_widths_of_tasks`` |
| integer, bool, complex, not two dimensions | ``test_statistics.py::test_bad_shapes_and_types`` |
| ridge, anchor, number of folds | ``test_numbers_out_of_range`` |
| another backbone or feature norm | ``test_statistics_of_another_kind``, \
``test_statistics.py::test_other_kinds_do_not_add`` |
| no expert or merged energy | ``test_nothing_to_align`` |
| one sample | ``test_one_sample`` |
"""

import math
import warnings
from collections.abc import Callable

import pytest
import torch

from lightning_merge.correction import ClosedFormCorrection, CorrectionStatistics
from lightning_merge.functional.procrustes import orthogonal_factor
from lightning_merge.functional.ridge import dual_ridge

SIZES = {"a": 20, "b": 35, "c": 50}
FIXED = {"beta": 1e-2, "prior": "procrustes"}


@pytest.fixture
def correction(make_features: Callable, make_statistics: Callable) -> ClosedFormCorrection:
    return ClosedFormCorrection(make_statistics(make_features(SIZES)), **FIXED)


@pytest.mark.parametrize(
    ("preference", "message"),
    [
        ([0.5, math.nan, 0.5], "'b' is nan"),
        ([0.5, math.inf, 0.5], "'b' is inf"),
        ({"c": -0.5, "a": 1}, "'c' is -0.5"),
        ([1, 1], "2 weights for the 3 tasks"),
        (torch.ones(4), "4 weights for the 3 tasks"),
        ([0, 0, 0], "every weight of the preference is zero"),
        ({}, "every weight of the preference is zero"),
    ],
)
def test_preferences(correction: ClosedFormCorrection, preference: object, message: str) -> None:
    head = torch.ones(2, 6), None
    for ask in (
        lambda: correction.solve(preference),
        lambda: correction.solve_many([[1, 1, 1], preference]),
        lambda: correction.fold(preference, "a", *head),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


def test_a_sum_other_than_one(correction: ClosedFormCorrection) -> None:
    W = correction.solve([0.25, 0.25, 0.5]).weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(correction.solve([1, 1, 2]).weight, W)
    strict = ClosedFormCorrection(correction.statistics, strict=True, **FIXED)
    with pytest.warns(UserWarning, match="sums to 4, expected 1"):
        assert torch.equal(strict.solve([1, 1, 2]).weight, W)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strict.solve([0.25, 0.25, 0.5 + 1e-7])
    stricter = ClosedFormCorrection(correction.statistics, strict="error", **FIXED)
    with pytest.raises(ValueError, match="sums to 4, expected 1"):
        stricter.solve([1, 1, 2])


def test_unknown_and_missing_tasks(correction: ClosedFormCorrection) -> None:
    with pytest.raises(KeyError, match=r"unknown tasks \['x'\].*known: \['a', 'b', 'c'\]"):
        correction.solve({"a": 1, "x": 1})
    assert torch.equal(correction.solve({"c": 3}).weight, correction.solve([0, 0, 1]).weight)


def test_numbers_out_of_range(correction: ClosedFormCorrection) -> None:
    statistics = correction.statistics
    for beta in (-1.0, math.nan, {"a": 1.0, "b": -1e-9, "c": 0.0}):
        with pytest.raises(ValueError, match="beta=.*at least 0"):
            ClosedFormCorrection(statistics, beta=beta)
    for anchor in (-1e-9, math.nan, math.inf):
        with pytest.raises(ValueError, match="anchor=.*at least 0"):
            ClosedFormCorrection(statistics, anchor=anchor)
    for folds in (1, 0, -2):
        with pytest.raises(ValueError, match=f"num_folds={folds}: expected at least 2"):
            CorrectionStatistics(3, 3, num_folds=folds)


@pytest.mark.parametrize("kind", [{"fingerprint": "other"}, {"feature_norm": "l2"}])
def test_statistics_of_another_kind(correction: ClosedFormCorrection, kind: dict) -> None:
    other = CorrectionStatistics(6, 6, **kind)
    with pytest.raises(ValueError, match=f"different backbones: {next(iter(kind))} "):
        ClosedFormCorrection({**correction.statistics, "d": other}, **FIXED)
    with pytest.raises(ValueError, match="different backbones"):
        correction.with_task("d", other)


@pytest.mark.parametrize("silent", ["expert", "merged"])
@pytest.mark.parametrize("options", [FIXED, {}, {"prior": "identity", "bias": "per_task"}])
def test_nothing_to_align(
    make_features: Callable, make_statistics: Callable, silent: str, options: dict
) -> None:
    features = make_features(SIZES)
    Z, Y = features["b"]
    features["b"] = (Z, 0 * Y) if silent == "expert" else (0 * Z, Y)
    correction = ClosedFormCorrection(make_statistics(features), **options)
    with pytest.raises(ValueError, match=r"'b': .*nothing to align"):
        correction.solve([1, 1, 1], "a")


@pytest.mark.parametrize("prior", ["auto", "procrustes"])
def test_one_sample(make_features: Callable, make_statistics: Callable, prior: str) -> None:
    """The prior is anchored at the identity, the ridge is the default, and it is said."""
    features = make_features({"a": 1})
    Z, Y = features["a"]
    correction = ClosedFormCorrection(make_statistics(features), prior=prior)
    with pytest.warns(UserWarning, match="'a': 1 calibration samples .* too few to choose by"):
        W = correction.solve([1]).weight
    W0 = orthogonal_factor(Y.T @ Z)
    assert torch.allclose(W, dual_ridge(Z.T, Y.T, W0, 0.01 * float(Z.square().sum()) / 6))
    # What neither vector touches stays as it is.
    unseen = torch.linalg.svd(torch.cat([Z, Y]))[2][2:]
    assert torch.allclose(unseen @ W.T, unseen, atol=1e-12)
