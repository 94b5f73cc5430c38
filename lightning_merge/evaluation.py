"""Counting correct answers: of one network, or of all preferences in one pass."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_merge.merged import MergedModel
from lightning_merge.networks import (
    call_network,
    first_linear,
    plain_copy,
    set_submodule,
)
from lightning_merge.runtime import Runtime
from lightning_merge.scoring import MetricTally

Loader = Iterable[tuple[Any, Tensor]]
"""Batches of inputs and integer labels; every process iterates its own share."""

MAX_LOGITS = 2**25
"""Logits of all preferences held at a time (128 MiB in float32)."""


CHECKED = 8
"""Samples on which the stacked heads are compared with the plain network."""


@dataclass(frozen=True)
class Scores:
    """Counts of correct answers: of P preferences, and of the uncorrected head, on one task.

    Where the task has a metric of its own, its values stand beside counts of zero.
    """

    correct: Tensor
    """``(P,)`` int64."""
    uncorrected: int
    samples: int
    features: Tensor
    """Representation ``(n, d)`` of some of the samples, on the first process."""
    labels: Tensor
    """Their labels ``(n,)``."""
    measured: Tensor | None = None
    """``(P + 1,)`` float64: the task's own metric, of the uncorrected head last."""

    @property
    def values(self) -> Tensor:
        """``(P,)`` float64: the task's metric, by default the accuracy."""
        return self.accuracy if self.measured is None else self.measured[:-1]

    @property
    def uncorrected_value(self) -> float:
        """The same of the uncorrected head."""
        if self.measured is None:
            return self.uncorrected / self.samples
        return float(self.measured[-1])

    @property
    def accuracy(self) -> Tensor:
        """``(P,)`` float64, in [0, 1]."""
        return self.correct.double() / self.samples


def evaluate(
    network: nn.Module, batches: Loader, runtime: Runtime, description: str
) -> tuple[int, int]:
    """Count a network's correct answers on one test set.

    Returns:
        Correct answers and samples, summed over all processes.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=runtime.device)
    network.eval().to(runtime.device)
    with torch.inference_mode():
        for inputs, labels in _shown(batches, runtime, description):
            with runtime.precision():
                logits = class_scores(call_network(network, inputs))
            counts[0] += count_correct(logits.unsqueeze(0), labels)[0]
            counts[1] += len(labels)
    correct, samples = runtime.reduce(counts).tolist()
    return correct, _not_empty(samples, description)


def measure(
    network: nn.Module, batches: Loader, runtime: Runtime, description: str, metric: Metric
) -> float:
    """A network's metric on one test set, over the samples of all processes.

    Raises:
        ValueError: If the test set is empty, or the metric has several values.
    """
    tally = MetricTally(metric, 1, runtime)
    samples = torch.zeros((), dtype=torch.int64, device=runtime.device)
    network.eval().to(runtime.device)
    with torch.inference_mode():
        for inputs, targets in _shown(batches, runtime, description):
            with runtime.precision():
                outputs = outputs_of(call_network(network, inputs))
            tally.update(outputs.unsqueeze(0), targets)
            samples += len(targets)
    _not_empty(int(runtime.reduce(samples)), description)
    return float(tally.compute())


def sweep_task(
    model: MergedModel,
    task: str,
    preferences: Tensor,
    batches: Loader,
    runtime: Runtime,
    *,
    folded: tuple[Tensor, Tensor] | None = None,
    metric: Metric | None = None,
    max_logits: int = MAX_LOGITS,
    keep: int = 0,
) -> Scores:
    """Evaluate all preferences on one task's test set in one pass through the backbone.

    The task's head is replaced by one that answers for all preferences at a time, each with its
    own folded first layer; whatever the network does after its head sees ``P`` times the batch.
    Memory is bounded by ``max_logits``: where the answers of a batch are more, its forward pass is
    split.

    Args:
        model: The merged model.
        task: The task.
        preferences: ``(P, T)``, in the order of the model's tasks.
        batches: The task's test set; each process its share.
        runtime: This process's place among others.
        folded: The task's folded heads, ``(P, K, d)`` and ``(P, K)``, where they are known.
        metric: What is measured, of (outputs, targets); by default the accuracy.
        max_logits: Numbers held at a time.
        keep: Return the representation of about this many samples, spread over the test set.

    Raises:
        ValueError: If the test set is empty, or the network mixes samples after its head.
    """
    network = plain_copy(model.network)
    original = plain_copy(model.heads[task])
    if folded is None:
        folded = model.correction.fold(preferences, task, *model.linear_heads()[task])
    stacked = _StackedHead(plain_copy(original), model.head, *folded)
    set_submodule(network, model.head, stacked)
    network.eval().to(runtime.device)
    size = len(preferences) + 1  # the last one is the uncorrected head
    counts = torch.zeros(size + 1, dtype=torch.int64, device=runtime.device)
    rows = max(1, max_logits // (size * stacked.width))
    tally = None if metric is None else MetricTally(metric, size, runtime)
    scores_of = class_scores if tally is None else outputs_of
    checked = False
    kept = _EvenSample(keep)
    with torch.inference_mode():
        for inputs, labels in _shown(batches, runtime, f"Sweeping {task}"):
            for part, truth in _parts(inputs, labels, rows):
                with runtime.precision():
                    logits = scores_of(call_network(network, part))
                logits = logits.unflatten(0, (size, -1))
                if not checked:
                    few, _ = next(_parts(part, truth, CHECKED))
                    _check_unmixed(model, original, few, logits[-1], runtime)
                    checked = True
                if tally is None:
                    counts[:-1] += count_correct(logits, truth)
                else:
                    tally.update(logits, truth)
                counts[-1] += len(truth)
                kept.add(stacked.linear.seen, truth)
    counts = runtime.reduce(counts).cpu()
    samples = _not_empty(int(counts[-1]), task)
    measured = None if tally is None else tally.compute()
    return Scores(counts[:-2], int(counts[-2]), samples, *kept.tensors(), measured)


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Correct answers of each of P models on the same samples.

    Args:
        logits: ``(P, n, K)``.
        labels: ``(n,)``, integers in ``[0, K)``.

    Returns:
        ``(P,)`` int64.
    """
    return (logits.argmax(-1) == labels).sum(1)


def class_scores(output: Any) -> Tensor:
    """Class scores ``(n, K)`` of a network's output, for accuracy.

    Raises:
        ValueError: If there are none; the message says how other outputs are scored.
    """
    found = output.get("logits") if isinstance(output, Mapping) else output
    if isinstance(found, Tensor) and found.ndim == 2 and found.shape[1] > 1:
        return found
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
    raise ValueError(
        f"accuracy needs class scores of shape (n, classes) from the network, found {shape}. "
        "For one binary logit, several labels or a regression declare the task's metric: metrics: "
        "{task: {class_path: torchmetrics.classification.BinaryAUROC}}, or test_metric(task) of "
        "the datamodule; or sweep through the project's own test_step with --via test_step."
    )


def outputs_of(output: Any) -> Tensor:
    """Outputs ``(n, ...)`` of a network: a tensor, or the ``logits`` of a mapping.

    Raises:
        ValueError: If there are none.
    """
    found = output.get("logits") if isinstance(output, Mapping) else output
    if isinstance(found, Tensor) and found.ndim >= 1:
        return found
    raise ValueError(
        "a metric needs the network's outputs as one tensor or as the 'logits' of a mapping, "
        f"found {type(output).__name__}. Sweep through the project's own test_step instead: "
        "--via test_step."
    )


class _StackedHead(nn.Module):
    """A head that answers for P preferences and uncorrected: ``(n, ...)`` in, ``((P+1) n, ...)``.

    Folded weights of P preferences are one ``(P+1) K x d`` matrix.
    """

    def __init__(self, head: nn.Module, path: str, weights: Tensor, biases: Tensor) -> None:
        super().__init__()
        name, layer = first_linear(head, path)
        weight = layer.weight.detach()
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
        joined = torch.cat([weights.to(weight), weight.unsqueeze(0)])
        self.width = len(weight)
        self.linear = _StackedLinear(joined, torch.cat([biases.to(weight), bias.unsqueeze(0)]))
        if name:
            set_submodule(head, name, self.linear)
        self.head = head if name else self.linear

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.head(*args, **kwargs)


class _StackedLinear(nn.Module):
    def __init__(self, weights: Tensor, biases: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weights.flatten(0, 1))
        self.register_buffer("bias", biases.flatten())
        self.copies = len(weights)
        self.seen = weights.new_empty(0, weights.shape[-1])

    def forward(self, features: Tensor) -> Tensor:
        self.seen = features
        answers = nn.functional.linear(features, self.weight, self.bias)  # type: ignore[arg-type]
        return torch.cat(answers.chunk(self.copies, dim=-1))


class _EvenSample:
    """Between ``size`` and twice as many rows, evenly spread over a stream of unknown length."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._stride = 1
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, features: Tensor, labels: Tensor) -> None:
        if not self._size:
            return
        step = self._stride
        self._parts.append((features[::step].cpu().clone(), labels[::step].cpu().clone()))
        while sum(len(rows) for _, rows in self._parts) > 2 * self._size:
            self._parts = [(z[::2].clone(), rows[::2].clone()) for z, rows in self._parts]
            self._stride *= 2

    def tensors(self) -> tuple[Tensor, Tensor]:
        if not self._parts:
            return torch.empty(0), torch.empty(0)
        features, labels = zip(*self._parts, strict=True)
        return torch.cat(features), torch.cat(labels)


def _check_unmixed(
    model: MergedModel, head: nn.Module, inputs: Any, found: Tensor, runtime: Runtime
) -> None:
    network = plain_copy(model.network)
    set_submodule(network, model.head, head)
    with runtime.precision():
        expected = outputs_of(call_network(network.eval().to(runtime.device), inputs))
    error = (found[: len(expected)].float() - expected.float()).abs().max()
    if not error <= 1e-3 * expected.float().abs().max().clamp_min(1e-6):
        raise ValueError(
            f"{type(model.network).__name__} mixes samples of a batch after its head "
            f"'{model.head}' (outputs differ by {float(error):.2e}), so preferences cannot share "
            "one pass. Merge the part of the network up to its logits."
        )


def _parts(inputs: Any, labels: Tensor, rows: int) -> Iterator[tuple[Any, Tensor]]:
    if len(labels) <= rows:
        yield inputs, labels
        return
    for start in range(0, len(labels), rows):
        span = slice(start, start + rows)
        if isinstance(inputs, Mapping):
            yield {name: value[span] for name, value in inputs.items()}, labels[span]
        elif isinstance(inputs, (tuple, list)):
            yield [value[span] for value in inputs], labels[span]
        else:
            yield inputs[span], labels[span]


def _shown(batches: Loader, runtime: Runtime, description: str) -> Iterator[tuple[Any, Tensor]]:
    total = len(batches) if isinstance(batches, Sized) else 0
    for batch in runtime.progress(batches, total, description):
        inputs, labels = runtime.to_device(batch)
        yield inputs, labels


def _not_empty(samples: int, what: str) -> int:
    if samples == 0:
        raise ValueError(f"{what}: the test set is empty, so there is nothing to evaluate.")
    return samples
