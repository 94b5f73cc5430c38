"""The loop of AdaMerging: samples in, coefficients out."""

import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_merge.batch_norm import reestimate_batch_norm
from lightning_merge.functional.adamerging import projected
from lightning_merge.methods.adaptation.coefficients import LearnedCoefficients
from lightning_merge.methods.adaptation.forward import SharedNetwork
from lightning_merge.methods.adaptation.gradients import MergedWeights, Sums, TaskBatch, sums_of
from lightning_merge.methods.adaptation.sampling import rows_of
from lightning_merge.methods.adaptation.state import LearningState, adam_step
from lightning_merge.methods.calibrated import Calibration
from lightning_merge.networks import call_network, logits_of, named_state, plain_copy
from lightning_merge.runtime import PeakMemory
from lightning_merge.states import STATISTIC_SUFFIXES

if TYPE_CHECKING:
    from lightning_merge.methods.adamerging import AdaMerging

HALVE_AFTER, GIVE_UP_AFTER = 3, 10
"""Steps in a row without a finite loss, after which the learning rate is halved, or all ends."""


class Learner:
    """Learns the coefficients of one merge.

    Args:
        method: Hyper-parameters.
        calibration: Networks, inputs and processes.
        shared: The network whose backbone is merged, and all heads.
        weights: Its parameters.
        groups: Names of the groups of parameters.
        identity: Says what run a state file belongs to.
    """

    def __init__(
        self,
        method: "AdaMerging",
        calibration: Calibration,
        shared: SharedNetwork,
        weights: MergedWeights,
        groups: tuple[str, ...],
        identity: str,
    ) -> None:
        self.method, self.calibration, self.runtime = method, calibration, calibration.runtime
        self.shared, self.weights, self.groups = shared, weights, groups
        self.identity = identity
        self.tasks = tuple(shared.heads)
        self.classes = self._try_networks()
        self.scales = [1 / math.log(c) if method.normalize else 1.0 for c in self.classes]
        self.answers = self._expert_answers() if method.loss != "entropy" else {}

    def learn(self) -> LearnedCoefficients:
        """Run until the steps are over, or the loss no longer falls.

        Raises:
            ValueError: If ten steps in a row have no finite loss.
        """
        method, start, memory = self.method, time.perf_counter(), PeakMemory(self.runtime.device)
        state = self._state()
        self._warn_of_few_samples()
        if state.buffers:
            self._load_buffers(state.buffers)
        steps = range(state.step, method.steps)
        for _ in self.runtime.progress(steps, len(steps), "AdaMerging"):
            if self._converged(state):
                break
            self._step(state)
            memory.note()
            if state.step % method.save_every == 0:
                self._save(state)
        self._save(state)
        memory.note()
        cost = {"seconds": time.perf_counter() - start, "peak_memory": memory.bytes}
        return self._result(state, cost)

    def _state(self) -> LearningState:
        method = self.method
        if method.state_path is not None and Path(method.state_path).exists():
            return LearningState.load(method.state_path, self.identity)
        shape = (len(self.groups), len(self.tasks))
        start = torch.full(shape, method.first_coefficient, dtype=torch.float64)
        return LearningState.fresh(
            projected(start, method.bounds), method.lr, self.classes, len(self.weights.group_of)
        )

    def _step(self, state: LearningState) -> None:
        self.weights.write(state.coefficients)
        if self.method.bn == "shared" and state.step % self.method.bn_every == 0:
            self._reestimate(state)
        sums = self.sums(state.step)
        gradient, loss = sums.gradient, float(sums.loss.sum())
        finite = math.isfinite(loss) and bool(torch.isfinite(gradient).all())
        coefficients = state.coefficients
        if finite:
            state.failures = 0
            state.reached |= sums.reached > 0
            state.smooth(sums.predictions, loss)
            state.coefficients = projected(adam_step(state, gradient), self.method.bounds)
        nothing = torch.full((len(self.tasks),), math.nan, dtype=torch.float64)
        state.note(
            entropy=sums.entropy if finite else nothing,
            marginal_entropy=_marginal_entropy(state.marginal) if state.updates else nothing,
            loss=torch.tensor(loss if finite else math.nan),
            gradient_norm=gradient.norm() if finite else torch.tensor(math.nan),
            coefficients=torch.stack([coefficients.min(), coefficients.mean(), coefficients.max()]),
        )
        state.step += 1
        if not finite:
            self._failed(state)

    def sums(self, step: int) -> Sums:
        """Loss, predictions and gradient of one step, of all processes; the weights are filled."""
        method = self.method
        batches = {}
        for task in self.tasks:
            inputs = self.calibration.inputs[task]
            rows = rows_of(method.seed, task, step, len(inputs), method.batch_size)
            mine = rows[self.runtime.rank :: self.runtime.world_size]
            if len(mine):
                answers = self.answers[task][mine] if task in self.answers else None
                batches[task] = TaskBatch(
                    inputs=self.runtime.to_device(inputs.take(mine)),
                    size=len(rows),
                    expert=None if answers is None else answers.to(self.runtime.device),
                )
        found = sums_of(
            self.shared,
            self.weights,
            batches,
            self.tasks,
            self.scales,
            (len(self.groups), len(self.tasks), max(self.classes)),
            method.loss,
            method.max_images_per_forward,
        )
        return found.filled(self.runtime.reduce(found.flat().to(self.runtime.device)).cpu())

    def _failed(self, state: LearningState) -> None:
        state.failures += 1
        if state.failures >= GIVE_UP_AFTER:
            raise ValueError(
                f"AdaMerging: {GIVE_UP_AFTER} steps in a row had no finite loss, the last one is "
                f"step {state.step}. Lower lr, or merge in a wider precision."
            )
        if state.failures == HALVE_AFTER:
            state.lr /= 2

    def _converged(self, state: LearningState) -> bool:
        patience = self.method.patience
        return patience is not None and state.step - state.best_step > patience

    def _save(self, state: LearningState) -> None:
        if self.method.state_path is not None and self.runtime.is_first:
            state.save(self.method.state_path, self.identity)

    def _result(self, state: LearningState, cost: Mapping[str, float]) -> LearnedCoefficients:
        names = list(self.weights.group_of)
        unused = tuple(n for n, r in zip(names, state.reached, strict=True) if not r)
        if unused and state.updates:
            warnings.warn(
                f"{len(unused)} parameters get no gradient and keep their coefficient "
                f"(unused='{self.method.unused}'): {', '.join(unused[:5])}.",
                stacklevel=5,
            )
        learned = LearnedCoefficients(
            values=state.coefficients,
            groups=self.groups,
            tasks=self.tasks,
            unused=unused,
            history=state.stacked_history(),
            record={"steps": state.step, "lr": state.lr, **cost},
        )
        if collapsed := learned.collapsed():
            warnings.warn(
                f"the predictions of {', '.join(collapsed)} fell into few classes: their low "
                "entropy is no gain. Use loss='expert_kl', or fewer steps.",
                stacklevel=5,
            )
        return learned

    def _try_networks(self) -> list[int]:
        """Find out whether tasks share forward passes; the number of classes of every task."""
        few = {
            task: self.runtime.to_device(self.calibration.inputs[task][slice(0, 2)])
            for task in self.tasks
        }
        self.weights.write(torch.zeros(len(self.groups), len(self.tasks), dtype=torch.float64))
        return self.shared.try_joint(few)

    def _expert_answers(self) -> dict[str, Tensor]:
        """Class scores of every expert on its own inputs, on the CPU; computed once, shared."""
        found = {}
        dtype = torch.promote_types(next(iter(self.weights.live.values())).dtype, torch.float32)
        for task, classes in zip(self.tasks, self.classes, strict=True):
            expert = plain_copy(self.calibration.network(task)).eval()
            scores = torch.zeros(len(self.calibration.inputs[task]), classes, dtype=dtype)
            for rows in self.calibration.slices(task):
                batch = self.runtime.to_device(self.calibration.inputs[task][rows])
                with torch.inference_mode(), self.runtime.precision():
                    scores[rows] = logits_of(call_network(expert, batch)).to("cpu", dtype)
            found[task] = self.runtime.reduce(scores.to(self.runtime.device)).cpu()
        return found

    def _warn_of_few_samples(self) -> None:
        sizes = {task: len(self.calibration.inputs[task]) for task in self.tasks}
        if few := [f"{t} ({n})" for t, n in sizes.items() if n < self.method.batch_size]:
            warnings.warn(
                f"fewer calibration inputs than a batch of {self.method.batch_size}, so they are "
                f"drawn with replacement: {', '.join(few)}.",
                stacklevel=5,
            )

    def _reestimate(self, state: LearningState) -> None:
        used = {task: self.calibration.inputs[task] for task in self.tasks}
        network, size = self.shared.network, self.calibration.batch_size
        if reestimate_batch_norm(network, self.shared.path, used, self.runtime, batch_size=size):
            state.buffers = {
                name: value.detach().cpu().clone()
                for name, value in named_state(network).items()
                if name.rpartition(".")[2] in STATISTIC_SUFFIXES
            }

    def _load_buffers(self, buffers: Mapping[str, Any]) -> None:
        live = named_state(self.shared.network)
        for name, value in buffers.items():
            live[name].copy_(value)


def _marginal_entropy(marginal: Tensor) -> Tensor:
    return torch.special.entr(marginal).sum(1)
