import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import MeanAbsoluteError, MeanSquaredError, PearsonCorrCoef, R2Score
from torchmetrics.classification import (
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MultilabelF1Score,
)

from lightning_merge.runtime import Runtime
from lightning_merge.scoring import MetricTally, aligned, declared, direction, title

LABELS = {
    "auroc": (BinaryAUROC, (1,), lambda n: torch.arange(n) % 2),
    "classes": (partial(MulticlassF1Score, num_classes=3), (3,), lambda n: torch.arange(n) % 3),
    "curves": (partial(MulticlassAUROC, num_classes=3), (3,), lambda n: torch.arange(n) % 3),
    "labels": (
        partial(MultilabelF1Score, num_labels=4),
        (4,),
        lambda n: torch.arange(4 * n).view(n, 4) % 3 % 2,
    ),
    "error": (MeanSquaredError, (1,), lambda n: torch.arange(n) / n),
    "vector": (MeanAbsoluteError, (2,), lambda n: torch.arange(2.0 * n).view(n, 2) / n),
    "r2": (R2Score, (1,), lambda n: torch.arange(n) / n),
    "pearson": (PearsonCorrCoef, (1,), lambda n: torch.arange(n) / n),
}


@pytest.mark.parametrize("kind", LABELS)
@given(copies=st.integers(1, 4), size=st.integers(7, 20), batch=st.integers(2, 9))
def test_each_model_is_measured_as_if_it_were_alone(kind, copies, size, batch):
    make, shape, targets = LABELS[kind]
    truth = targets(size)
    outputs = torch.randn(copies, size, *shape)
    outputs[:, 0] = -2.0  # logits, for all to see
    tally = MetricTally(make(), copies, Runtime())
    for start in range(0, size, batch):
        span = slice(start, start + batch)
        tally.update(outputs[:, span], truth[span])
    for row, found in zip(outputs, tally.compute(), strict=True):
        expected = make()(aligned(row, truth), truth)
        torch.testing.assert_close(float(found), float(expected), rtol=1e-5, atol=1e-6)


class Meeting:
    """Sums over threads that stand for processes."""

    def __init__(self, size):
        self.size, self.given, self.barrier = size, {}, threading.Barrier(size, timeout=20)

    def runtime(self, rank):
        def add_up(value):
            self.given[rank] = value
            self.barrier.wait()
            total = sum(self.given[other] for other in range(self.size))
            self.barrier.wait()
            return total

        return Runtime(rank=rank, world_size=self.size, reduce=add_up)


@pytest.mark.parametrize("kind", ["auroc", "curves", "labels", "error", "r2", "pearson"])
@pytest.mark.parametrize("empty", [False, True])
def test_two_processes_measure_what_one_does(kind, empty):
    make, shape, targets = LABELS[kind]
    outputs, truth = torch.randn(2, 11, *shape), targets(11)
    outputs[:, ::4] = -2.0
    parts = [(outputs[:, s], truth[s]) for s in (slice(0, 4), slice(4, 8), slice(8, 11))]
    meeting = Meeting(2)

    def measured(rank, share):
        tally = MetricTally(make(), 2, meeting.runtime(rank))
        for part in share:
            tally.update(*part)
        return tally.compute()

    shares = [parts, []] if empty else [parts[::2], parts[1::2]]
    with ThreadPoolExecutor(2) as threads:
        found = [
            future.result(30)
            for future in [threads.submit(measured, *s) for s in enumerate(shares)]
        ]
    alone = MetricTally(make(), 2, Runtime())
    for part in parts:
        alone.update(*part)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], alone.compute(), rtol=1e-5, atol=1e-7)


def test_metrics_without_one_value_or_a_direction_are_refused():
    tally = MetricTally(MulticlassAccuracy(3, average=None), 1, Runtime())
    tally.update(torch.randn(1, 5, 3), torch.arange(5) % 3)
    with pytest.raises(ValueError, match=r"MulticlassAccuracy gives \(3,\).*average='macro'"):
        tally.compute()
    with pytest.raises(ValueError, match="MulticlassConfusionMatrix of 'a' does not say whether"):
        direction({"a": MulticlassConfusionMatrix(3)})
    with pytest.raises(ValueError, match="a: MeanSquaredError, b: R2Score.*no direction"):
        direction({"a": MeanSquaredError(), "b": R2Score()})
    assert direction({"a": R2Score()})
    assert not direction({"a": MeanSquaredError(), "b": MeanAbsoluteError()})
    assert title({"a": R2Score(), "b": BinaryAUROC(), "c": R2Score()}) == "R2Score, BinaryAUROC"


class Declaring:
    def test_metric(self, task):
        return {"a": BinaryAUROC()}.get(task)


def test_metrics_are_given_or_declared():
    assert declared(object(), "ab", None) is None
    chosen = declared(Declaring(), "ab", {"b": R2Score()})
    assert [type(chosen[task]) for task in "ab"] == [BinaryAUROC, R2Score]
    with pytest.raises(ValueError, match="some tasks have a metric, but b has none"):
        declared(Declaring(), "ab", None)
    with pytest.raises(ValueError, match=r"unknown tasks \['x'\]; the model has a, b"):
        declared(Declaring(), "ab", {"x": R2Score()})
