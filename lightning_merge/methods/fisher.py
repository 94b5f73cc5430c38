"""Fisher: the average weighted by how much each task's predictions depend on an entry."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from lightning_merge.functional.fisher import fisher_terms
from lightning_merge.functional.seeds import seed_of
from lightning_merge.functional.spread import evenly_spread
from lightning_merge.methods.calibrated import CalibratedMethod, Calibration
from lightning_merge.methods.outcome import Outcome, PlannedTreatment
from lightning_merge.methods.parts import (
    check_finite_inputs,
    check_inputs,
    check_weights,
    completed,
    known_of_buffer,
    parts_of,
    treatments_of,
)
from lightning_merge.methods.sample_gradients import SquaredGradients
from lightning_merge.networks import call_network, logits_of, plain_copy
from lightning_merge.states import StateDict, check_compatible, check_finite


@final
@dataclass(frozen=True, kw_only=True)
class Fisher(CalibratedMethod):
    """Averages the experts, entry by entry, weighted with their diagonal Fisher information."""

    samples: int = 256
    """Calibration inputs of each task, spread evenly over those there are."""

    exact_classes: int = 32
    """Up to this many classes the expectation over labels is exact; beyond, labels are drawn."""

    draws: int = 4
    """Labels drawn for a sample from the expert's prediction, where there are more classes."""

    normalize: bool = True
    """Divide each expert's information by its norm over the model, so that tasks weigh alike."""

    epsilon: float = 1e-6
    """Added to the information: entries that no task depends on get the average."""

    weights: dict[str, float] | None = None
    """Weight of each expert by task, not negative; null: all alike."""

    samples_at_once: int = 8
    """Samples whose gradients are in memory at a time, each as large as the backbone."""

    seed: int = 0
    """Of the labels drawn; they depend on it, the task, and the sample's number alone."""

    def __post_init__(self) -> None:
        for name in ("samples", "draws", "samples_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}.")
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise ValueError(f"epsilon must be a positive number, found {self.epsilon}.")
        weights = list((self.weights or {"": 1.0}).values())
        if not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) == 0:
            raise ValueError(
                f"weights must be finite, none negative and not all zero, found {self.weights}."
            )

    def merge(
        self, base: StateDict, experts: Mapping[str, StateDict], calibration: Calibration
    ) -> dict[str, Tensor]:
        """Merge the experts; one expert's information is in memory at a time, and two sums.

        Raises:
            ValueError: If base and experts do not fit, calibration inputs of a task are missing
                or not finite, or a task's head does not give class scores.
        """
        return self.outcome(base, experts, calibration).state

    def outcome(
        self, base: StateDict, experts: Mapping[str, StateDict], calibration: Calibration
    ) -> Outcome:
        """Merge as :meth:`merge` does, and tell which tensors are plainly averaged, or kept."""
        check_compatible(base, experts)
        check_weights(self.weights, experts)
        check_inputs(experts, calibration.inputs, "Fisher")
        first = plain_copy(calibration.network(next(iter(experts))))
        parts = parts_of(first, calibration.head, base)
        del first
        numerator: dict[str, Tensor] = {}
        denominator: dict[str, Tensor] = {}
        for task, expert in experts.items():
            weight = 1.0 if self.weights is None else self.weights[task]
            fisher = self.information(task, calibration, parts.parameters)
            norm = math.sqrt(sum(float(value.square().sum()) for value in fisher.values()))
            if norm == 0:
                warnings.warn(f"'{task}': no parameter changes its predictions.", stacklevel=2)
            for name in parts.parameters:
                value = expert[name].detach()
                check_finite(name, f"expert '{task}'", value)
                share = fisher.pop(name) / (norm if self.normalize and norm > 0 else 1.0)
                terms = fisher_terms(value.cpu(), share.cpu(), weight, self.epsilon)
                for sums, term in zip((numerator, denominator), terms, strict=True):
                    sums[name] = sums[name].add_(term) if name in sums else term
        merged = {name: value.div_(denominator.pop(name)) for name, value in numerator.items()}
        state = completed(merged, parts, base, experts, self.weights)
        return Outcome(state=state, treatments=treatments_of(parts))

    def known_treatment(self, name: str, shape: tuple[int, ...], kind: str) -> PlannedTreatment:
        """Buffers are averaged or kept; parameters need the data."""
        return known_of_buffer(name, kind)

    def information(
        self, task: str, calibration: Calibration, names: tuple[str, ...] | None = None
    ) -> dict[str, Tensor]:
        """Diagonal Fisher information of one expert, in float64, the mean over its samples.

        Args:
            task: Whose expert and calibration inputs.
            calibration: Networks, inputs and processes; every process returns the same.
            names: Parameters wanted; all of the backbone by default.

        Raises:
            ValueError: If an input, or what comes of the inputs, is not finite.
        """
        network = plain_copy(calibration.network(task)).eval()
        wanted = _parameters(network, calibration.head, names)
        squares = SquaredGradients(network, wanted)
        inputs, runtime = calibration.inputs[task], calibration.runtime
        rows = evenly_spread(len(inputs), self.samples)
        check_finite_inputs(task, inputs, rows, calibration.batch_size)
        chunks = list(runtime.share(rows.split(self.samples_at_once)))
        drawn = self._num_classes(network, inputs.take(rows[:1]), calibration) > self.exact_classes
        total = {n: torch.zeros_like(v, dtype=torch.float64) for n, v in wanted.items()}
        for chunk in runtime.progress(chunks, len(chunks), f"Fisher information of {task}"):
            uniforms = self._uniforms(task, chunk).to(runtime.device) if drawn else None
            found = squares.sum_of(runtime.to_device(inputs.take(chunk)), uniforms)
            for name, value in found.items():
                total[name] += value
        mean = {name: runtime.reduce(value) / len(rows) for name, value in total.items()}
        if wrong := [name for name, value in mean.items() if not bool(value.isfinite().all())]:
            raise ValueError(
                f"'{task}': the Fisher information of {len(wrong)} parameters holds NaN or "
                f"infinity: {', '.join(wrong[:5])}. Its predictions or their gradients overflow on "
                "the calibration inputs: check these and the expert, or use a wider precision."
            )
        return mean

    def _num_classes(self, network: nn.Module, batch: object, calibration: Calibration) -> int:
        with torch.inference_mode():
            return logits_of(call_network(network, calibration.runtime.to_device(batch))).shape[1]

    def _uniforms(self, task: str, rows: Tensor) -> Tensor:
        seeds = [seed_of(self.seed, task, int(row)) for row in rows]
        return torch.stack(
            [torch.rand(self.draws, generator=torch.Generator().manual_seed(s)) for s in seeds]
        )


def _parameters(network: nn.Module, head: str, names: tuple[str, ...] | None) -> dict[str, Tensor]:
    # of a copy without wrappers, whose names are clean
    live = dict(network.named_parameters())
    chosen = [name for name in live if not name.startswith(f"{head}.")] if names is None else names
    return {name: live[name] for name in chosen}
