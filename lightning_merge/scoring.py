"""Any ``torchmetrics`` metric for all preferences of a sweep at a time, exact over processes."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_merge.runtime import Runtime

ACCURACY = "accuracy"
MAX_DIMENSIONS = 6


class MetricTally:
    """One copy of a metric for each of P models that answer for the same samples.

    Its states are summed, stacked or joined over processes as the metric itself says, each sample
    once; a process without samples takes part with nothing.

    Args:
        metric: The metric; it is copied and stays as it is.
        copies: P.
        runtime: This process's place among others.
    """

    def __init__(self, metric: Metric, copies: int, runtime: Runtime) -> None:
        self._runtime = runtime
        self._logits: bool | None = None
        self._copies = [metric.clone().to(runtime.device) for _ in range(copies)]
        for copy in self._copies:
            copy.reset()
            copy.sync_on_compute = False

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add the answers ``(P, n, ...)`` to ``n`` samples with these targets ``(n, ...)``."""
        for copy, answers in zip(self._copies, self._normalized(outputs), strict=True):
            copy.update(aligned(answers, targets), targets)

    def compute(self) -> Tensor:
        """The metric of each of the P models, ``(P,)`` float64, the same on every process.

        Raises:
            ValueError: If the metric has several values.
        """
        if self._runtime.world_size > 1:
            self._gather()
        values = torch.zeros(len(self._copies), dtype=torch.float64, device=self._runtime.device)
        if self._runtime.is_first:  # it has samples, if any process has
            for index, copy in enumerate(self._copies):
                values[index] = _scalar(copy, copy.compute())
        return self._runtime.reduce(values).cpu()

    def _normalized(self, outputs: Tensor) -> Tensor:
        """Logits as probabilities, decided once for all batches and models.

        torchmetrics decides at every update, so that a batch whose logits happen to lie in [0, 1]
        would be taken for probabilities and ranked among the others as such.
        """
        squash = _squashing(self._copies[0])
        if squash is None or not outputs.is_floating_point():
            return outputs
        outside = bool(((outputs < 0) | (outputs > 1)).any())
        if self._logits is None:
            self._logits = outside
        if outside and not self._logits:
            raise ValueError(
                f"{type(self._copies[0]).__name__}: the first batch looks like probabilities, a "
                "later one like logits. End the network in its logits."
            )
        return squash(outputs) if self._logits else outputs

    def _gather(self) -> None:
        for name, reduction in self._copies[0]._reductions.items():
            states = [getattr(copy, name) for copy in self._copies]
            if isinstance(states[0], list):
                own = torch.stack([torch.cat(s) for s in states]) if states[0] else None
                joined: Iterable[Any] = ([part] for part in _joined(own, self._runtime))
            else:
                parts = _by_process(torch.stack(states), self._runtime).transpose(0, 1)
                joined = (reduction(part) if callable(reduction) else part for part in parts)
            for copy, state in zip(self._copies, joined, strict=False):
                setattr(copy, name, state)


def _squashing(metric: Metric) -> Callable[[Tensor], Tensor] | None:
    kind = type(metric)
    if not kind.__module__.startswith("torchmetrics.classification"):
        return None
    if kind.__name__.startswith(("Binary", "Multilabel")):
        return torch.sigmoid
    if kind.__name__.startswith("Multiclass"):
        return lambda outputs: outputs.softmax(2)  # (P, n, K, ...)
    return None


def aligned(answers: Tensor, targets: Tensor) -> Tensor:
    """Answers ``(n, 1)`` of a single output as ``(n,)``, where the targets are ``(n,)``.

    >>> aligned(torch.zeros(4, 1), torch.zeros(4)).shape
    torch.Size([4])
    """
    single = answers.ndim == 2 and answers.shape[1] == 1 and targets.ndim == 1
    return answers.squeeze(1) if single else answers


def direction(metrics: Mapping[str, Metric]) -> bool:
    """Whether larger is better, which all tasks must agree on.

    Raises:
        ValueError: If a metric does not say, or the tasks differ.
    """
    found = {task: metric.higher_is_better for task, metric in metrics.items()}
    if unknown := [task for task, better in found.items() if better is None]:
        names = ", ".join(f"{type(metrics[task]).__name__} of '{task}'" for task in unknown)
        raise ValueError(
            f"{names} does not say whether larger values are better, so it ranks nothing. Choose "
            "a metric whose higher_is_better is True or False."
        )
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{task}: {type(metrics[task]).__name__}" for task in found)
        raise ValueError(
            f"of some tasks larger values are better, of others smaller ones ({listed}), so a "
            "sweep has no direction. Give metrics of one direction, such as R2Score for errors."
        )
    return bool(next(iter(found.values()), True))


def title(metrics: Mapping[str, Metric]) -> str:
    """Name of the metric: of all tasks, or the different ones in the order of the tasks."""
    return ", ".join(dict.fromkeys(type(metric).__name__ for metric in metrics.values()))


def declared(
    source: object, tasks: Iterable[str], chosen: Mapping[str, Metric] | None
) -> dict[str, Metric] | None:
    """The metrics of a sweep's tasks: those given, else what the data declares.

    Args:
        source: A datamodule; its ``test_metric(task)``, if it has one, gives the metric of a task,
            or ``None`` for accuracy.
        tasks: The tasks.
        chosen: Metrics by task that have the say over the datamodule's.

    Returns:
        Metrics by task; ``None`` where no task has one, for plain accuracy.

    Raises:
        ValueError: If some tasks have a metric and others none.
    """
    tasks = list(tasks)
    ask: Callable[[str], Metric | None] = getattr(source, "test_metric", lambda task: None)
    found = {task: (chosen or {}).get(task) or ask(task) for task in tasks}
    if unknown := sorted(set(chosen or {}) - set(tasks)):
        raise ValueError(f"metrics of unknown tasks {unknown}; the model has {', '.join(tasks)}.")
    if missing := [task for task, metric in found.items() if metric is None]:
        if len(missing) == len(tasks):
            return None
        raise ValueError(
            f"some tasks have a metric, but {', '.join(missing)} has none: declare one for each, "
            "with metrics: {task: {class_path: ...}} or the datamodule's test_metric(task)."
        )
    return {task: metric for task, metric in found.items() if metric is not None}


def _scalar(metric: Metric, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(
        f"{type(metric).__name__} gives {shape}, but a sweep needs one number a task: choose an "
        "average, such as average='macro'."
    )


def _by_process(own: Tensor, runtime: Runtime) -> Tensor:
    """What every process has, stacked in their order ``(processes, ...)``."""
    values = own.to(torch.uint8) if own.dtype is torch.bool else own
    places = values.new_zeros((runtime.world_size, *values.shape))
    places[runtime.rank] = values
    return runtime.reduce(places).to(own.dtype)


def _joined(own: Tensor | None, runtime: Runtime) -> Tensor:
    """Join ``(P, n, ...)`` of every process along ``n``; ``None`` where a process has nothing."""
    facts = torch.zeros(3 + MAX_DIMENSIONS, dtype=torch.int64, device=runtime.device)
    dtypes = (torch.float32, torch.int64, torch.float64, torch.bool, torch.int32, torch.float16)
    if own is not None:
        facts[:3] = torch.tensor([1, dtypes.index(own.dtype), own.ndim])
        facts[3 : 3 + own.ndim] = torch.tensor(own.shape)
    known = _by_process(facts, runtime)
    template = known[int(known[:, 0].argmax())].tolist()
    sizes = known[:, 4].tolist()
    shape = [template[3], sum(sizes), *template[5 : 3 + template[2]]]
    dtype = dtypes[template[1]]
    kept = torch.uint8 if dtype is torch.bool else dtype
    whole = torch.zeros(shape, dtype=kept, device=runtime.device)
    if own is not None:
        start = sum(sizes[: runtime.rank])
        whole[:, start : start + own.shape[1]] = own.to(kept)
    return runtime.reduce(whole).to(dtype)
