"""Everything that changes while AdaMerging learns, in one file, so that a killed run goes on."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lightning_merge.files import write_tensors
from lightning_merge.states import LazyStateDict

SERIES = ("entropy", "marginal_entropy", "loss", "gradient_norm", "coefficients")
SMOOTHING = 0.9
"""Share of the past in running means of loss and predictions."""


GAIN = 1e-4
"""Relative fall of the running mean of the loss that counts as one."""


@dataclass
class LearningState:
    """Coefficients, optimizer, running means and history after a number of steps."""

    coefficients: Tensor
    """``(G, K)`` float64."""
    first: Tensor
    """Adam's running mean of the gradient."""
    second: Tensor
    """Adam's running mean of its square."""
    marginal: Tensor
    """``(K, C)`` running mean of the predictions, zero beyond a task's classes."""
    lr: float
    step: int = 0
    """Steps done, skipped ones among them."""
    updates: int = 0
    """Steps that changed the coefficients."""
    failures: int = 0
    """Steps skipped in a row, because their loss was not finite."""
    smoothed: float = math.nan
    best: float = math.inf
    best_step: int = 0
    reached: Tensor = field(default_factory=lambda: torch.zeros(0))
    """``(N,)`` whether a parameter ever had a gradient."""
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """Running statistics of batch norms."""
    history: dict[str, list[Tensor]] = field(default_factory=lambda: {n: [] for n in SERIES})

    @classmethod
    def fresh(
        cls, start: Tensor, lr: float, sizes: Sequence[int], num_names: int
    ) -> "LearningState":
        """Before the first step."""
        return cls(
            coefficients=start.clone(),
            first=torch.zeros_like(start),
            second=torch.zeros_like(start),
            marginal=torch.zeros(len(sizes), max(sizes), dtype=torch.float64),
            lr=lr,
            reached=torch.zeros(num_names, dtype=torch.bool),
        )

    def smooth(self, marginal: Tensor, loss: float) -> None:
        """Take the mean predictions and the loss of one step into the running means."""
        old = SMOOTHING if self.updates else 0.0
        self.marginal = old * self.marginal + (1 - old) * marginal
        self.smoothed = loss if not self.updates else old * self.smoothed + (1 - old) * loss
        if self.smoothed < self.best - GAIN * abs(self.smoothed):
            self.best, self.best_step = self.smoothed, self.step

    def note(self, **values: Tensor) -> None:
        """Add one step to the history."""
        for name in SERIES:
            self.history[name].append(values[name].detach().double().clone())

    def stacked_history(self) -> dict[str, Tensor]:
        """The history as one tensor a series."""
        return {name: torch.stack(rows) for name, rows in self.history.items() if rows}

    def save(self, path: str | Path, identity: str) -> None:
        """Write the state in one step.

        Args:
            path: A safetensors file.
            identity: Says what run it belongs to.
        """
        numbers = {
            name: getattr(self, name)
            for name in ("lr", "step", "updates", "failures", "smoothed", "best", "best_step")
        }
        tensors = {name: getattr(self, name) for name in ("coefficients", "first", "second")}
        tensors |= {"marginal": self.marginal, "reached": self.reached}
        tensors |= {f"history/{name}": value for name, value in self.stacked_history().items()}
        tensors |= {f"buffers/{name}": value for name, value in self.buffers.items()}
        # Python writes and reads NaN and infinity in JSON, and floats to the last bit.
        write_tensors(path, tensors, {"identity": identity, "numbers": json.dumps(numbers)})

    @classmethod
    def load(cls, path: str | Path, identity: str) -> "LearningState":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If it belongs to another run.
        """
        file = LazyStateDict(path)
        if file.metadata.get("identity") != identity:
            raise ValueError(
                f"{path} is the state of another run: its hyper-parameters, experts or calibration "
                "inputs differ. Give another state_path, or delete the file to start anew."
            )
        found = {name: file[name] for name in file}
        history = {name: list(found.get(f"history/{name}", torch.zeros(0))) for name in SERIES}
        return cls(
            coefficients=found["coefficients"].clone(),
            first=found["first"].clone(),
            second=found["second"].clone(),
            marginal=found["marginal"].clone(),
            reached=found["reached"].clone(),
            history=history,
            buffers={
                name.removeprefix("buffers/"): value.clone()
                for name, value in found.items()
                if name.startswith("buffers/")
            },
            **json.loads(file.metadata["numbers"]),
        )


def adam_step(state: LearningState, gradient: Tensor) -> Tensor:
    """Coefficients after one step of Adam (Kingma and Ba, ICLR 2015) with its usual constants."""
    state.updates += 1
    state.first = 0.9 * state.first + 0.1 * gradient
    state.second = 0.999 * state.second + 0.001 * gradient.square()
    mean = state.first / (1 - 0.9**state.updates)
    spread = (state.second / (1 - 0.999**state.updates)).sqrt()
    return state.coefficients - state.lr * mean / (spread + 1e-8)
