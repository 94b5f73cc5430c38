"""Methods that look at calibration data besides the weights."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from lightning_merge.calibration import CalibrationInputs
from lightning_merge.methods.base import MergeMethod
from lightning_merge.methods.outcome import Outcome, PlannedTreatment
from lightning_merge.runtime import Runtime
from lightning_merge.states import StateDict


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a :class:`CalibratedMethod` may ask for: experts that run, and unlabeled inputs."""

    network: Callable[[str], nn.Module]
    """A fresh copy of a task's own expert with its head, in eval mode on the runtime's device.

    A method that needs the network with other weights fills such a copy."""
    head: str
    """Dotted path of the head in every network."""
    inputs: Mapping[str, CalibrationInputs]
    """Unlabeled inputs by task."""
    runtime: Runtime = field(default_factory=Runtime)
    """This process's place among those that share the work; ``reduce`` sums over them."""
    batch_size: int = 128
    """Samples a forward pass, of all processes together one batch after the other."""

    def with_at_most(self, samples: int | None) -> "Calibration":
        """The same with so many inputs of each task, evenly spread; None: with all of them."""
        if samples is None:
            return self
        fewer = {task: inputs.spread(samples) for task, inputs in self.inputs.items()}
        return replace(self, inputs=fewer)

    def slices(self, task: str) -> list[slice]:
        """This process's batches of a task, as slices of samples, none repeated, none padded."""
        return list(self.runtime.share(self.inputs[task].batches(self.batch_size)))

    def batches(self, task: str) -> Iterator[Any]:
        """This process's batches of a task, on the device; run them by ``call_network``."""
        for rows in self.slices(task):
            yield self.runtime.to_device(self.inputs[task][rows])


@dataclass(frozen=True, kw_only=True)
class CalibratedMethod(MergeMethod):
    """A method that looks at unlabeled calibration inputs, or at gradients on them."""

    @abstractmethod
    def merge(
        self, base: StateDict, experts: Mapping[str, StateDict], calibration: Calibration
    ) -> dict[str, Tensor]:
        """Merge the experts into one state dict; arguments and result as in ``WeightMethod``."""

    def outcome(
        self, base: StateDict, experts: Mapping[str, StateDict], calibration: Calibration
    ) -> Outcome:
        """Merge as :meth:`merge` does, and give what the method found for the merged record.

        A method with something to tell has its own; by default there is nothing but the weights.
        """
        return Outcome(state=self.merge(base, experts, calibration))

    def known_treatment(self, name: str, shape: tuple[int, ...], kind: str) -> PlannedTreatment:
        """What an entry will get, as far as that is known without a pass: for the dry run.

        Args:
            name: The entry's name.
            shape: Its shape.
            kind: ``"floating"`` or ``"integer"``, see :func:`lightning_merge.states.kind_of`.
        """
        return "unknown"

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration inputs of every task must be there."""
        return True
