"""How far whole merged networks are from their experts, where the heads read."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

from torch import nn

from lightning_merge.batch_norm import reestimate_batch_norm
from lightning_merge.calibrating import statistics_of_merges
from lightning_merge.correction import CorrectionOptions, CorrectionStatistics
from lightning_merge.correction.checks import Head
from lightning_merge.correction.validation import HeldOutError, cross_validated_errors
from lightning_merge.merging import MergeInputs
from lightning_merge.networks import (
    first_linear,
    get_submodule,
    load_backbone,
    plain_copy,
    set_submodule,
)
from lightning_merge.states import StateDict


@dataclass(frozen=True)
class MergeError:
    """Held-out errors behind the heads, relative to the experts' variance, mean over tasks."""

    uncorrected: float
    corrected: float
    """Each task with its own correction."""
    tasks: Mapping[str, HeldOutError] = field(default_factory=dict)


def merge_errors(given: MergeInputs, states: Mapping[str, StateDict]) -> dict[str, MergeError]:
    """Errors of several merges of the same experts, each as it is and with corrections of its own.

    All merged networks are in memory at once, so that each expert runs a single time. Every
    correction is searched as a merge would search it: the error is that of its prior and ridge.

    Args:
        given: Base, experts and calibration inputs.
        states: Merged backbones by name.
    """
    runtime, head = given.calibration.runtime, given.calibration.head
    networks = _networks(given, states)
    statistics: dict[str, dict[str, CorrectionStatistics]] = {name: {} for name in states}
    heads: dict[str, Head] = {}
    for task in given.experts:
        expert = given.calibration.network(task)
        own = get_submodule(expert, head)
        for network in networks.values():
            set_submodule(network, head, plain_copy(own))
        found = statistics_of_merges(
            list(networks.values()),
            expert,
            head,
            given.calibration.inputs[task],
            runtime,
            batch_size=given.calibration.batch_size,
            description=f"Calibrating {task}",
        )
        for name, one in zip(networks, found, strict=True):
            statistics[name][task] = one
        heads[task] = _linear(own, head)
    names = list(states)
    return {
        name: _error(statistics[name], heads)
        for name in runtime.progress(names, len(names), "Correcting", str)
    }


def _networks(given: MergeInputs, states: Mapping[str, StateDict]) -> dict[str, nn.Module]:
    calibration = given.calibration
    networks = {}
    for name, state in states.items():
        network = networks[name] = calibration.network(next(iter(given.experts)))
        load_backbone(network, state, calibration.head)
        reestimate_batch_norm(
            network,
            calibration.head,
            calibration.inputs,
            calibration.runtime,
            batch_size=calibration.batch_size,
        )
    return networks


def _linear(head: nn.Module, path: str) -> Head:
    layer = first_linear(head, path)[1]
    bias = None if layer.bias is None else layer.bias.detach().cpu()
    return layer.weight.detach().cpu(), bias


def _error(statistics: Mapping[str, CorrectionStatistics], heads: Mapping[str, Head]) -> MergeError:
    correction = CorrectionOptions().build(statistics, heads)
    errors = cross_validated_errors(correction, None, heads=heads)
    alone = [e.identity for e in errors.values() if e.identity is not None]
    if len(alone) < len(errors):
        warnings.warn("experts of another width have no uncorrected error.", stacklevel=4)
    return MergeError(
        uncorrected=fmean(alone) if alone else math.nan,
        corrected=fmean(e.corrected for e in errors.values()),
        tasks=errors,
    )
