"""Features of a merge, so that any number of corrections is measured without another pass."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.suites import Experts
from lightning_merge.batch_norm import reestimate_batch_norm
from lightning_merge.calibration import CalibrationInputs
from lightning_merge.correction import ClosedFormCorrection, CorrectionOptions, CorrectionStatistics
from lightning_merge.methods import CalibratedMethod, Calibration, MergeMethod, WeightMethod
from lightning_merge.networks import build_head, load_backbone, representation, set_submodule
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
            preference: One for all tasks, or each task under its own: ``"one-hot"``, or
                ``"priority"``, half of the weight.
        """
        return {task: self.score(task, correction, preference) for task in self.test}

    def _wanted(self, task: str) -> dict[str, float]:
        rest = 0.5 / max(1, len(self.test) - 1)
        return {other: 0.5 if other == task else rest for other in self.test}

    def score(
        self, task: str, correction: ClosedFormCorrection | None, preference: object
    ) -> float:
        """Accuracy of one task; arguments as in :meth:`scores`."""
        weight, bias = self.references.heads[task]
        if correction is not None:
            wanted = self._wanted(task) if preference == "priority" else preference
            wanted = {task: 1.0} if preference == "one-hot" else wanted
            weight, bias = correction.fold(wanted, task, weight, bias)  # type: ignore[arg-type]
        labels = self.experts.tasks[task].test[1]
        logits = self.test[task].double() @ weight.double().T + bias.double()
        accuracy = float((logits.argmax(1) == labels).double().mean())
        return accuracy / self.references.accuracy[task]


def calibration_of(experts: Experts, tasks: Sequence[str], limit: int | None = None) -> Calibration:
    """What methods that look at data may ask for; see ``Calibration``."""
    pool = experts.pool

    def network(task: str) -> nn.Module:
        filled = copy.deepcopy(experts.template)
        load_backbone(filled, pool.expert(task), pool.head)
        old = filled.get_submodule(pool.head)
        set_submodule(filled, pool.head, build_head(old, pool.head_state(task)))
        return filled.eval()

    inputs = {t: CalibrationInputs.collect(experts.tasks[t].calibration, limit) for t in tasks}
    return Calibration(network=network, head=pool.head, inputs=inputs, batch_size=BATCH)


def backbone(
    experts: Experts,
    method: MergeMethod,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
) -> dict[str, Tensor]:
    """The merged backbone of any method."""
    names = list(tasks or experts.tasks)
    states = {task: experts.pool.expert(task) for task in names}
    if isinstance(method, WeightMethod):
        return method.merge(experts.pool.base, states)
    assert isinstance(method, CalibratedMethod)
    return method.merge(experts.pool.base, states, calibration_of(experts, names, limit))


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
    state: StateDict | None = None,
) -> Merge:
    """Merge with re-estimated batch norms, as ``merge_experts`` does, and pass all inputs.

    Args:
        experts: The experts.
        method: Any method.
        known: Their references.
        limit: Calibration samples of each task; all by default.
        tasks: Merge these only.
        state: The merged backbone, where it is there already.
    """
    names = list(tasks or experts.tasks)
    merged = backbone(experts, method, names, limit) if state is None else state
    return features_of(experts, merged, known, limit=limit, tasks=names)


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
