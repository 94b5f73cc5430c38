"""The whole of the merge in one call, with no Trainer: pool in, merged model out."""

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from lightning_merge.batch_norm import reestimate_batch_norm
from lightning_merge.calibrating import correction_statistics
from lightning_merge.calibration import CalibrationInputs
from lightning_merge.correction import CorrectionOptions, CorrectionStatistics
from lightning_merge.correction.validation import warn_of_harm
from lightning_merge.merged import MergedModel
from lightning_merge.methods import (
    Average,
    CalibratedMethod,
    Calibration,
    MergeMethod,
    WeightMethod,
)
from lightning_merge.methods.buffers import knowing_buffers
from lightning_merge.methods.interference import MergeReport, ReportDepth, merge_report
from lightning_merge.methods.outcome import Outcome
from lightning_merge.networks import (
    build_head,
    floating_buffers,
    get_submodule,
    load_backbone,
    named_state,
    plain_copy,
    set_submodule,
)
from lightning_merge.pool import ExpertPool
from lightning_merge.runtime import Runtime
from lightning_merge.sources import Experts, chosen_tasks, open_source
from lightning_merge.states import StateDict

Correction: TypeAlias = CorrectionOptions | Literal["paper"] | None
BatchNorm: TypeAlias = Literal["auto", "reestimate", "average"]
SameBase: TypeAlias = Literal["warn", "error"]


def merge_experts(
    experts: ExpertPool | Mapping[str, nn.Module],
    method: MergeMethod | None = None,
    calibration: Mapping[str, Any] | None = None,
    *,
    correction: Correction = CorrectionOptions(),  # noqa: B008 (frozen)
    base: nn.Module | None = None,
    head: str | None = None,
    module: nn.Module | None = None,
    tasks: Sequence[str] | None = None,
    batch_norm: BatchNorm = "auto",
    batch_size: int = 128,
    device: torch.device | str | None = None,
    runtime: Runtime | None = None,
    check: bool = True,
    report: ReportDepth | MergeReport = "full",
    same_base: SameBase = "warn",
) -> MergedModel:
    """Merge the experts' backbones and calibrate the correction of the representation.

    At most one expert is in memory at a time, beside the merged model, and one parameter of the
    others; features are summed into statistics batch by batch and never kept.

    Args:
        experts: A pool; or fine-tuned networks by task, with ``base`` and ``head``.
        method: How the backbones are merged; the average by default.
        calibration: Unlabeled inputs by task, as ``ExpertPool.add`` takes them; the pool's own by
            default.
        correction: Options of the correction, ``"paper"`` for the published recipe, or ``None``
            for a merge without.
        base: The network before fine-tuning, for experts given as modules.
        head: Dotted path of the head, for experts given as modules.
        module: Network to fill, with any weights, for a pool that cannot build its own.
        tasks: Merge these only, in this order; all of the pool by default.
        batch_norm: Running statistics of batch norms: ``reestimate`` on calibration inputs,
            ``average`` over the experts, or ``auto``: re-estimate where there are inputs.
        batch_size: Samples a forward pass of calibration.
        device: Where to calibrate; the CPU by default.
        runtime: Processes and device, where several share the work.
        check: Warn if the correction does harm on samples left out.
        report: Measure first how the experts interfere, layer by layer: ``full``; ``brief``,
            without the singular directions of matrices, which cost some seconds; ``off``; or the
            report of these experts, where it has been made before.
        same_base: What to do about an expert that seems to come from another base: ``warn`` or
            ``error``. Found by the report.

    Raises:
        ValueError: If there are fewer than two experts, one is unknown or unfit, or calibration
            inputs are missing; nothing is written in any case.
    """
    source, inputs = open_source(experts, calibration, base, head)
    names = chosen_tasks(source, tasks)
    method = method or Average()
    runtime = runtime or Runtime(device=torch.device(device or "cpu"))
    options = CorrectionOptions.paper() if correction == "paper" else correction
    inputs = {task: found for task in names if (found := inputs(task)) is not None}
    _check_inputs(names, inputs, options, method, batch_norm)

    network = source.network() if module is None else plain_copy(module)
    template = plain_copy(get_submodule(network, source.head))
    heads = {task: build_head(template, source.head_state(task)).eval() for task in names}
    timings: dict[str, float] = {}

    start = time.perf_counter()
    lazily = {task: source.expert(task) for task in names}
    if not isinstance(report, MergeReport) and report != "off":
        report = measure(source.base, lazily, report, same_base, runtime)
    timings["interference"] = time.perf_counter() - start

    start = time.perf_counter()
    outcome: Outcome | None = None
    informed = knowing_buffers(method, floating_buffers(network, source.base))
    if isinstance(informed, WeightMethod):
        origin = source.base
        walk = runtime.over_parameters(list(origin), "Merging")
        state = dict(each for _, each in zip(walk, informed.stream(origin, lazily), strict=True))
    elif isinstance(informed, CalibratedMethod):
        calibrated = _calibration(source, network, heads, inputs, runtime, batch_size)
        outcome = informed.outcome(source.base, lazily, calibrated)
        state, method = outcome.state, outcome.method or method
    else:
        raise ValueError(f"{type(method).__name__} is neither a WeightMethod nor CalibratedMethod.")
    load_backbone(network, state, source.head)
    del state
    network.eval().to(runtime.device)
    if batch_norm != "average" and len(inputs) == len(names):
        reestimate_batch_norm(network, source.head, inputs, runtime, batch_size=batch_size)
    timings["merge"] = time.perf_counter() - start

    start = time.perf_counter()
    statistics: dict[str, CorrectionStatistics] = {}
    if options is not None:
        statistics = _calibrated(source, network, heads, inputs, runtime, batch_size)
    timings["calibrate"] = time.perf_counter() - start

    model = MergedModel(
        network=network.cpu(),
        head=source.head,
        heads={task: heads[task].cpu() for task in names},
        statistics=statistics,
        options=options or CorrectionOptions(),
        model=source.model,
        report=_written(report, informed, network, outcome),
        files={} if outcome is None else dict(outcome.files),
        record={
            "method": describe(method),
            "base_fingerprint": source.fingerprint,
            "pool": str(source.path) if isinstance(source, ExpertPool) else None,
            "calibration": {task: len(samples) for task, samples in inputs.items()},
            "batch_norm": batch_norm,
            "timings": timings,
        },
    )
    if check and statistics:
        warn_of_harm(model.correction, model.linear_heads())
    return model


def measure(
    base: StateDict,
    experts: Mapping[str, StateDict],
    report: Literal["full", "brief"],
    same_base: SameBase,
    runtime: Runtime,
) -> MergeReport:
    """The merge report under a bar, with its warnings.

    Raises:
        ValueError: If ``same_base`` is ``error`` and an expert is implausibly far from the base.
    """
    found = merge_report(
        base,
        experts,
        singular=report == "full",
        progress=lambda names: runtime.over_parameters(names, "Measuring"),
    )
    far = found.strangers()
    if far and same_base == "error":
        raise ValueError(" ".join(far))
    if runtime.is_first:
        for message in [*far, *found.unmoved()]:
            warnings.warn(message, stacklevel=3)
    return found


def _written(
    report: MergeReport | str, method: MergeMethod, network: nn.Module, outcome: Outcome | None
) -> dict[str, Any]:
    found = {"found": dict(outcome.found)} if outcome is not None and outcome.found else {}
    if not isinstance(report, MergeReport):
        return found
    got = None if outcome is None else outcome.treatments
    measured = report.under(method, got).in_order(list(named_state(network)))
    return {**measured.as_dict(), **found}


@dataclass(frozen=True, kw_only=True)
class MergeInputs:
    """What a :class:`~lightning_merge.methods.CalibratedMethod` merges."""

    base: StateDict
    """Backbone of the base."""
    experts: dict[str, StateDict]
    """Backbones of the experts by task; those of a pool are read lazily."""
    calibration: Calibration
    """Networks and unlabeled inputs."""


def calibration_for(
    experts: ExpertPool | Mapping[str, nn.Module],
    calibration: Mapping[str, Any] | None = None,
    *,
    base: nn.Module | None = None,
    head: str | None = None,
    module: nn.Module | None = None,
    tasks: Sequence[str] | None = None,
    batch_size: int = 128,
    runtime: Runtime | None = None,
) -> MergeInputs:
    """Give the three arguments of ``CalibratedMethod.merge``; as for :func:`merge_experts`.

    Example:
        ``found = calibration_for(experts, inputs, base=network, head="head")``, then
        ``RegMean().merge(found.base, found.experts, found.calibration)``.

    Raises:
        ValueError: If there are fewer than two experts, or inputs of one are missing.
    """
    source, inputs_of = open_source(experts, calibration, base, head)
    names = chosen_tasks(source, tasks)
    inputs = {task: found for task in names if (found := inputs_of(task)) is not None}
    if missing := [task for task in names if task not in inputs]:
        raise ValueError(
            f"no calibration inputs for {', '.join(missing)}: add the experts with calibration=, "
            "or give calibration={task: inputs}."
        )
    network = source.network() if module is None else plain_copy(module)
    template = plain_copy(get_submodule(network, source.head))
    heads = {task: build_head(template, source.head_state(task)).eval() for task in names}
    return MergeInputs(
        base=source.base,
        experts={task: source.expert(task) for task in names},
        calibration=_calibration(source, network, heads, inputs, runtime or Runtime(), batch_size),
    )


def describe(method: MergeMethod) -> dict[str, Any]:
    """A method as plain data: ``{"class_path", "init_args"}``."""
    kind = type(method)
    arguments = {field.name: _plain(getattr(method, field.name)) for field in fields(method)}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def _plain(value: Any) -> Any:
    """Methods within methods keep their class."""
    if isinstance(value, MergeMethod):
        return describe(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(item) for item in value)
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _check_inputs(
    names: Iterable[str],
    inputs: Mapping[str, CalibrationInputs],
    options: CorrectionOptions | None,
    method: MergeMethod,
    batch_norm: BatchNorm,
) -> None:
    missing = [task for task in names if task not in inputs]
    reasons = {
        "the correction": options is not None,
        f"the method {type(method).__name__}": isinstance(method, CalibratedMethod)
        and method.needs_inputs,
        "batch_norm='reestimate'": batch_norm == "reestimate",
    }
    needing = [reason for reason, applies in reasons.items() if applies]
    if missing and needing:
        raise ValueError(
            f"no calibration inputs for {', '.join(missing)}, which {' and '.join(needing)} needs. "
            "Add the experts with calibration=, give calibration={task: inputs}, or merge with "
            "correction=None (on the command line: --correction null)."
        )


def _calibrated(
    source: Experts,
    merged: nn.Module,
    heads: Mapping[str, nn.Module],
    inputs: Mapping[str, CalibrationInputs],
    runtime: Runtime,
    batch_size: int,
) -> dict[str, CorrectionStatistics]:
    expert = plain_copy(merged)
    statistics = {}
    for task, head in heads.items():
        load_backbone(expert, source.expert(task), source.head)
        for network in (merged, expert):
            set_submodule(network, source.head, plain_copy(head).to(runtime.device))
        statistics[task] = correction_statistics(
            merged,
            expert,
            source.head,
            inputs[task],
            runtime,
            batch_size=batch_size,
            description=f"Calibrating {task}",
        )
    return statistics


def _calibration(
    source: Experts,
    network: nn.Module,
    heads: Mapping[str, nn.Module],
    inputs: Mapping[str, CalibrationInputs],
    runtime: Runtime,
    batch_size: int,
) -> Calibration:
    def expert(task: str) -> nn.Module:
        filled = plain_copy(network)
        load_backbone(filled, source.expert(task), source.head)
        set_submodule(filled, source.head, plain_copy(heads[task]))
        return filled.eval().to(runtime.device)

    return Calibration(
        network=expert,
        head=source.head,
        inputs=inputs,
        runtime=runtime,
        batch_size=batch_size,
    )
