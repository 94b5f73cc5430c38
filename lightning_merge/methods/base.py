"""The two kinds of merging methods: from weights alone, and from weights and calibration data."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_merge.states import (
    STATISTIC_SUFFIXES,
    StateDict,
    check_compatible,
    check_finite,
    tied_names,
)


@dataclass(frozen=True, kw_only=True)
class MergeMethod(ABC):  # noqa: B024 (the two kinds take different arguments)
    """A recipe that makes one state dict from a base and its experts.

    A method is a frozen dataclass of hyper-parameters. Its inputs are never changed, and what it
    returns shares no memory with them.
    """


@dataclass(frozen=True, kw_only=True)
class WeightMethod(MergeMethod):
    """A method that needs nothing but weights, one parameter at a time."""

    def merge(self, base: StateDict, experts: Mapping[str, StateDict]) -> dict[str, Tensor]:
        """Merge the experts into one state dict with the base's keys, shapes and dtypes.

        Walks the parameters in the base's order and holds one parameter of all experts at a time,
        so lazily read mappings stream. Floating-point parameters go through :meth:`merge_tensor`;
        running statistics are averaged; integer and boolean buffers are the base's. Names that
        share one tensor are merged once and share one tensor in the result.

        Args:
            base: The pre-trained weights.
            experts: Fine-tuned weights by task, in the caller's order.

        Raises:
            ValueError: If keys or shapes differ from the base's, or a value is not finite; the
                message names the expert and the parameter.
        """
        check_compatible(base, experts)
        method = self.bind(base, experts)
        ties = tied_names(base)
        merged: dict[str, Tensor] = {}
        for name in base:
            if name in ties:
                merged[name] = merged[ties[name]]
                continue
            value = base[name]
            if not value.is_floating_point():
                merged[name] = value.clone()
                continue
            check_finite(name, "the base", value)
            stacked = _stack(name, experts)
            if name.rpartition(".")[2] in STATISTIC_SUFFIXES:
                merged[name] = stacked.mean(dim=0, dtype=torch.float64).to(value.dtype)
            else:
                merged[name] = method.merge_tensor(name, value, stacked)
        return merged

    def bind(self, base: StateDict, experts: Mapping[str, StateDict]) -> "WeightMethod":
        """Return the method to walk with, after whatever it must know of the whole model.

        Most methods need nothing and return themselves; one with a threshold over the whole task
        vector returns a method that holds the thresholds.
        """
        return self

    @abstractmethod
    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter.

        Args:
            name: Its name in the state dict.
            base: Its pre-trained value, of any shape.
            experts: Its fine-tuned values, of shape ``(T, *base.shape)``.

        Returns:
            The merged value, with the base's shape and dtype.
        """


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a :class:`CalibratedMethod` may ask for.

    ``network(task)`` is the task's own expert, ready to run; ``batches(task)`` are its unlabeled
    inputs, streamed; ``forward(network, inputs)`` runs one of them.
    """

    network: Callable[[str], nn.Module]
    batches: Callable[[str], Iterable[object]]
    forward: Callable[[nn.Module, object], Tensor]


@dataclass(frozen=True, kw_only=True)
class CalibratedMethod(MergeMethod):
    """A method that looks at unlabeled calibration inputs, or at gradients on them."""

    @abstractmethod
    def merge(
        self, base: StateDict, experts: Mapping[str, StateDict], calibration: Calibration
    ) -> dict[str, Tensor]:
        """Merge the experts into one state dict; arguments and result as in ``WeightMethod``."""


def _stack(name: str, experts: Mapping[str, StateDict]) -> Tensor:
    values = [expert[name] for expert in experts.values()]
    for task, value in zip(experts, values, strict=True):
        check_finite(name, f"expert '{task}'", value)
    dtype = values[0].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    return torch.stack([value.to(dtype) for value in values])
