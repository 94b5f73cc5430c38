"""Which tensors of a backbone are merged by gradients, and what becomes of the others."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_merge.calibration import CalibrationInputs, check_finite_batch
from lightning_merge.functional.average import average
from lightning_merge.methods.outcome import PlannedTreatment
from lightning_merge.methods.walk import stack_parameter
from lightning_merge.networks import clean_names, load_backbone, split_state
from lightning_merge.states import STATISTIC_SUFFIXES, StateDict, check_finite, kind_of, tied_names


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Names of a backbone's tensors by what they are."""

    parameters: tuple[str, ...]
    """Floating-point parameters, tied ones once, in the base's order."""
    ties: Mapping[str, str]
    """Further names of tied tensors, with the first name of each."""
    averaged: tuple[str, ...]
    """Floating-point buffers: averaged, never extrapolated."""
    kept: tuple[str, ...]
    """Integer and boolean buffers: the base's."""


def parts_of(network: nn.Module, head: str, base: StateDict) -> Parts:
    """Sort the backbone's tensors.

    Args:
        network: A network that the base fits, with any weights: it gets the base's.
        head: Dotted path of its head.
        base: The pre-trained backbone.

    Raises:
        ValueError: If base and network do not fit one another, the base holds a part of
            the head, or a parameter is of integers.
    """
    if own := [name for name in base if f"{name}.".startswith(f"{head}.")]:
        raise ValueError(
            f"the base holds {len(own)} tensors of the head '{head}' ({', '.join(own[:5])}), but "
            "every task keeps its own. Merge the backbone only."
        )
    load_backbone(network, base, head)
    live = split_state(network, head)[0]
    ties = tied_names(live)
    parameters = set(live_parameters(network))
    kinds = {name: kind_of(base, name) for name in base}
    if wrong := [n for n in base if n in parameters and kinds[n] != "floating"]:
        raise ValueError(
            f"{len(wrong)} parameters hold integers and cannot be merged: {', '.join(wrong[:5])}. "
            "Make them buffers."
        )
    first = [name for name in base if name not in ties]
    return Parts(
        parameters=tuple(name for name in first if name in parameters),
        ties={name: ties[name] for name in base if name in ties},
        averaged=tuple(n for n in first if n not in parameters and kinds[n] == "floating"),
        kept=tuple(n for n in first if n not in parameters and kinds[n] == "integer"),
    )


def live_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a network by clean name, tied ones under each of their names."""
    live = dict(network.named_parameters(remove_duplicate=False))
    return dict(zip(clean_names(live), live.values(), strict=True))


def completed(
    merged: Mapping[str, Tensor],
    parts: Parts,
    base: StateDict,
    experts: Mapping[str, StateDict],
    weights: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """A whole backbone, in the base's order and dtypes, from its merged parameters.

    Args:
        merged: The merged parameters, in any dtype.
        parts: What :func:`parts_of` found.
        base: The pre-trained backbone.
        experts: Fine-tuned backbones by task.
        weights: Weight of each expert in the average of buffers; all alike by default.
    """
    shares = torch.tensor([(weights or {}).get(t, 1.0) for t in experts], dtype=torch.float64)
    found: dict[str, Tensor] = {}
    for name in base:
        if name in parts.ties:
            continue
        value = base[name].detach()
        if name in merged:
            found[name] = merged[name].detach().to(value.device, value.dtype, copy=True)
        elif name in parts.averaged:
            stacked = stack_parameter(name, value, experts, [1.0] * len(experts))
            found[name] = average(stacked, shares).to(value.dtype)
        else:
            check_finite(name, "the base", value)
            found[name] = value.clone()
    return {name: found[parts.ties.get(name, name)] for name in base}


def treatments_of(parts: Parts) -> dict[str, PlannedTreatment]:
    """What the tensors get that are no parameters, as :func:`completed` gives it to them."""
    found: dict[str, PlannedTreatment] = dict.fromkeys(parts.averaged, "average")
    return {**found, **dict.fromkeys(parts.kept, "base")}


def known_of_buffer(name: str, kind: str) -> PlannedTreatment:
    """What an entry gets as far as name and kind tell, where :func:`completed` ends a merge."""
    if kind == "integer":
        return "base"
    return "average" if name.rpartition(".")[2] in STATISTIC_SUFFIXES else "unknown"


def check_weights(weights: Mapping[str, float] | None, tasks: Mapping[str, object]) -> None:
    """Raise a ``ValueError`` unless the weights name every task once."""
    if weights is not None and set(weights) != set(tasks):
        raise ValueError(
            f"weights must name every expert once: {', '.join(tasks)}; found "
            f"{', '.join(weights) or 'none'}."
        )


def check_finite_inputs(
    task: str, inputs: CalibrationInputs, rows: Tensor, batch_size: int
) -> None:
    """Raise a ``ValueError`` if a sample that will be used is not finite, on every process alike.

    Args:
        task: Whose inputs.
        inputs: All of them.
        rows: Numbers of the samples that will be used.
        batch_size: Samples looked at at a time.
    """
    for part in rows.split(batch_size):
        check_finite_batch(task, inputs.take(part), part.tolist())


def check_inputs(tasks: Mapping[str, object], inputs: Mapping[str, object], method: str) -> None:
    """Raise a ``ValueError`` naming every task without calibration inputs."""
    if missing := [task for task in tasks if task not in inputs]:
        raise ValueError(
            f"no calibration inputs for {', '.join(missing)}, which {method} needs. Give some for "
            "every task that is merged."
        )
