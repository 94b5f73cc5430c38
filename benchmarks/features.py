"""Features of a merge, so that any number of corrections is measured without another pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.suites import Experts
from lightning_merge.calibrating import reestimate_batch_norm
from lightning_merge.calibration import CalibrationInputs
from lightning_merge.correction import ClosedFormCorrection, CorrectionOptions, CorrectionStatistics
from lightning_merge.methods import MergeMethod, WeightMethod
from lightning_merge.networks import load_backbone, representation
from lightning_merge.runtime import Runtime
from lightning_merge.states import StateDict

Features = dict[str, Tensor]
BATCH = 250
Sizes = int | Mapping[str, int] | None
"""Calibration samples: of every task alike, by task, or all."""


@dataclass(frozen=True)
class References:
    """What does not depend on the merge."""

    calibration: Features
    """Features of every expert on its calibration inputs."""
    heads: dict[str, tuple[Tensor, Tensor]]
    accuracy: dict[str, float]
    """Of every expert, on its test set."""


@dataclass(frozen=True)
class Merge:
    """Features of one merged backbone, and what corrections of it are worth."""

    experts: Experts
    references: References
    calibration: Features
    test: Features

    @property
    def heads(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Heads of the merged tasks."""
        return {task: self.references.heads[task] for task in self.calibration}

    def statistics(
        self, sizes: int | Mapping[str, int] | None = None
    ) -> dict[str, CorrectionStatistics]:
        """Statistics of the first samples of every task: these many, or all."""
        found = {}
        for task, merged in self.calibration.items():
            size = sizes[task] if isinstance(sizes, Mapping) else sizes
            found[task] = CorrectionStatistics(merged.shape[1], merged.shape[1])
            found[task].update(merged[:size], self.references.calibration[task][:size])
        return found

    def correction(self, options: CorrectionOptions, sizes: Sizes = None) -> ClosedFormCorrection:
        return options.build(self.statistics(sizes), self.heads)

    def scores(
        self, correction: ClosedFormCorrection | None, preference: object
    ) -> dict[str, float]:
        """Accuracies by task over those of the experts.

        Args:
            correction: None for the merge as it is.
            preference: One for all tasks, or ``"one-hot"``: each task under its own.
        """
        return {task: self._score(task, correction, preference) for task in self.test}

    def _score(
        self, task: str, correction: ClosedFormCorrection | None, preference: object
    ) -> float:
        weight, bias = self.references.heads[task]
        if correction is not None:
            wanted: object = {task: 1.0} if preference == "one-hot" else preference
            weight, bias = correction.fold(wanted, task, weight, bias)  # type: ignore[arg-type]
        labels = self.experts.tasks[task].test[1]
        logits = self.test[task].double() @ weight.double().T + bias.double()
        accuracy = float((logits.argmax(1) == labels).double().mean())
        return accuracy / self.references.accuracy[task]


def references(experts: Experts, limit: int | None = None) -> References:
    """Features, heads and accuracies of the experts."""
    calibration, heads, accuracy = {}, {}, {}
    for task, data in experts.tasks.items():
        load_backbone(experts.template, experts.pool.expert(task), experts.pool.head)
        state = experts.pool.head_state(task)
        heads[task] = state["weight"], state["bias"]
        calibration[task] = extract(experts, data.calibration[:limit])
        logits = extract(experts, data.test[0]) @ state["weight"].T + state["bias"]
        accuracy[task] = float((logits.argmax(1) == data.test[1]).double().mean())
    return References(calibration, heads, accuracy)


def merge(
    experts: Experts,
    method: MergeMethod,
    known: References,
    *,
    limit: int | None = None,
    tasks: Sequence[str] | None = None,
) -> Merge:
    """Merge with re-estimated batch norms, as ``merge_experts`` does, and pass all inputs.

    Args:
        experts: The experts.
        method: Any method that needs weights alone.
        known: Their references.
        limit: Calibration samples of each task; all by default.
        tasks: Merge these only.
    """
    assert isinstance(method, WeightMethod)
    pool, names = experts.pool, list(tasks or experts.tasks)
    state = method.merge(pool.base, {task: pool.expert(task) for task in names})
    return features_of(experts, state, known, limit=limit, tasks=names)


def features_of(
    experts: Experts,
    state: StateDict,
    known: References,
    *,
    limit: int | None = None,
    tasks: Sequence[str] | None = None,
) -> Merge:
    """Re-estimate the batch norms of merged weights and pass all inputs; see :func:`merge`."""
    pool, network = experts.pool, experts.template
    data = {task: experts.tasks[task] for task in tasks or experts.tasks}
    load_backbone(network, state, pool.head)
    inputs = {t: CalibrationInputs.collect(d.calibration, limit) for t, d in data.items()}
    reestimate_batch_norm(network, pool.head, inputs, Runtime(), batch_size=BATCH)
    calibration = {t: extract(experts, d.calibration[:limit]) for t, d in data.items()}
    return Merge(
        experts, known, calibration, {t: extract(experts, d.test[0]) for t, d in data.items()}
    )


def extract(experts: Experts, inputs: Tensor) -> Tensor:
    """Representation of all inputs under the template's present weights."""
    network, head = experts.template.eval(), experts.pool.head
    with torch.inference_mode():
        rows = [representation(network, head, part) for part in inputs.split(BATCH)]
    return torch.cat(rows).clone()
