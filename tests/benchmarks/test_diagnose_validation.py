import pytest
from scipy.stats import spearmanr

from benchmarks.diagnose_validation import SCORES, Point, points, rank_correlation, verdict
from benchmarks.suites import build
from lightning_merge.methods import Average, OutputProjection, TaskArithmetic
from tests.benchmarks.test_suites import TOY


def test_every_merge_gets_both_scores_and_an_accuracy(tmp_path):
    methods = [TaskArithmetic(scale=0.0), Average(), OutputProjection(basis="task")]
    base, average, fitted = points(build("toy", 1, tmp_path, TOY), methods)
    assert base.layers == pytest.approx(0, abs=1e-9)
    assert base.representation == pytest.approx(0, abs=1e-9)
    assert average.layers > 0
    assert [p.sequential for p in (base, average, fitted)] == [False, False, True]
    assert all(p.accuracy >= 0 for p in (base, average, fitted))


def test_correlations_come_with_an_interval_around_them():
    x, y = list(range(20)), [i + (-1) ** i * 3 for i in range(20)]
    found, low, high = rank_correlation(x, y)
    assert found == pytest.approx(spearmanr(x, y).statistic)
    assert low < found < high <= 1
    assert rank_correlation(x, x) == pytest.approx((1, 1, 1))


def made(layers, accuracies, sequential=()):
    return [
        Point(str(i), x, x, y, i in sequential)
        for i, (x, y) in enumerate(zip(layers, accuracies, strict=True))
    ]


def test_the_verdict_says_what_the_figures_say():
    accuracies = [0.1 * i for i in range(1, 21)]
    good = made(range(20), accuracies)
    bad = made([(7 * i) % 20 for i in range(20)], accuracies)
    layers, fixed, _ = SCORES
    assert "ranks merges as accuracy does" in verdict(layers, [good, good])
    assert "1.000 of the best one's accuracy on average, 1.000" in verdict(layers, [good])
    assert "does not reliably predict" in verdict(layers, [good, bad])  # the worst run counts
    off = made([*range(19), -1], accuracies, sequential={19})
    assert fixed.of(off)[0] == pytest.approx(1)
    assert layers.of(off)[0] < 1
    assert layers.first(off) == pytest.approx(19 / 20)
