"""Where experts come from: a pool on disk, or modules in memory in the form of one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_merge.calibration import CalibrationInputs
from lightning_merge.networks import plain_copy, split_state
from lightning_merge.pool import ExpertPool
from lightning_merge.states import StateDict, fingerprint


class Experts(Protocol):
    """What a merge reads; an :class:`~lightning_merge.ExpertPool` is one."""

    @property
    def head(self) -> str:
        """Dotted path of the head."""

    @property
    def model(self) -> dict[str, Any] | None:
        """How to build the network."""

    @property
    def fingerprint(self) -> str:
        """Digest of the base's backbone."""

    @property
    def base(self) -> StateDict:
        """Backbone of the base."""

    @property
    def tasks(self) -> list[str]:
        """Tasks, in order."""

    def expert(self, task: str) -> StateDict:
        """Backbone of one expert."""

    def head_state(self, task: str) -> dict[str, Tensor]:
        """Head of one expert."""

    def calibration(self, task: str) -> CalibrationInputs | None:
        """Unlabeled inputs of one task."""

    def network(self) -> nn.Module:
        """A network to fill."""


@dataclass(frozen=True, kw_only=True)
class LoadedExperts:
    """Experts that are modules in memory, in the form of a pool."""

    modules: Mapping[str, nn.Module]
    origin: nn.Module
    head: str
    inputs: Mapping[str, CalibrationInputs]
    model: dict[str, Any] | None = None

    @property
    def base(self) -> StateDict:
        """Backbone of the base."""
        return split_state(self.origin, self.head)[0]

    @property
    def fingerprint(self) -> str:
        """Digest of the base's backbone."""
        return fingerprint(self.base)

    @property
    def tasks(self) -> list[str]:
        """Tasks, in the caller's order."""
        return list(self.modules)

    def expert(self, task: str) -> StateDict:
        """Backbone of one expert."""
        return split_state(self.modules[task], self.head)[0]

    def head_state(self, task: str) -> dict[str, Tensor]:
        """Head of one expert."""
        return split_state(self.modules[task], self.head)[1]

    def calibration(self, task: str) -> CalibrationInputs | None:
        """Unlabeled inputs of one task."""
        return self.inputs.get(task)

    def network(self) -> nn.Module:
        """A network to fill."""
        return plain_copy(self.origin)


def open_source(
    experts: ExpertPool | Mapping[str, nn.Module],
    calibration: Mapping[str, Any] | None,
    base: nn.Module | None,
    head: str | None,
) -> tuple[Experts, Any]:
    """Experts of either kind, and what gives a task's calibration inputs, as ``merge_experts``."""
    given = {
        task: CalibrationInputs.collect(samples) for task, samples in (calibration or {}).items()
    }
    if isinstance(experts, ExpertPool):
        if unknown := [task for task in given if task not in experts.tasks]:
            raise ValueError(
                f"calibration inputs for unknown tasks {unknown}; the pool has "
                f"{', '.join(experts.tasks)}."
            )
        return experts, lambda task: given.get(task) or experts.calibration(task)
    if base is None or head is None:
        raise ValueError(
            "experts given as modules need base=, the network before fine-tuning, and head=, the "
            "dotted path of its head."
        )
    loaded = LoadedExperts(modules=experts, origin=base, head=head, inputs=given)
    return loaded, loaded.calibration


def chosen_tasks(source: Experts, tasks: Sequence[str] | None) -> list[str]:
    """The tasks to merge, at least two: all of them, or those named."""
    names = source.tasks if tasks is None else list(tasks)
    if unknown := [task for task in names if task not in source.tasks]:
        raise ValueError(
            f"unknown tasks {unknown}; there are experts of: {', '.join(source.tasks) or 'none'}."
        )
    if len(set(names)) != len(names):
        raise ValueError(f"a task is named twice: {names}.")
    if len(names) < 2:
        raise ValueError(
            f"a merge needs at least two experts, found {len(names)} "
            f"({', '.join(names) or 'none'}). Add experts of more tasks to the pool first."
        )
    return names
