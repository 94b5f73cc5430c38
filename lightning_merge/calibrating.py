"""Passes over calibration inputs: the statistics of the correction."""

from collections.abc import Sequence

import torch
from torch import nn

from lightning_merge.calibration import CalibrationInputs
from lightning_merge.correction import CorrectionStatistics
from lightning_merge.networks import (
    first_linear,
    get_submodule,
    representation,
)
from lightning_merge.runtime import Runtime


def correction_statistics(
    merged: nn.Module,
    expert: nn.Module,
    head: str,
    inputs: CalibrationInputs,
    runtime: Runtime,
    *,
    batch_size: int,
    description: str,
) -> CorrectionStatistics:
    """Statistics of one task: features of both networks on the same inputs, summed and dropped.

    Every process runs its share of the batches; the sums are then added over the processes, so
    every process returns the statistics of all samples, each counted once.

    Args:
        merged: Network with the merged backbone and the task's head, on the runtime's device.
        expert: Network with the expert's backbone and the same head.
        head: Dotted path of the head in both.
        inputs: Unlabeled inputs of the task.
        runtime: This process's place among others.
        batch_size: Samples a forward pass.
        description: Text beside the progress bar.
    """
    (statistics,) = statistics_of_merges(
        [merged], expert, head, inputs, runtime, batch_size=batch_size, description=description
    )
    return statistics


def statistics_of_merges(
    merges: Sequence[nn.Module],
    expert: nn.Module,
    head: str,
    inputs: CalibrationInputs,
    runtime: Runtime,
    *,
    batch_size: int,
    description: str,
) -> list[CorrectionStatistics]:
    """Statistics of one task for several merged networks, from one pass of the expert.

    Args:
        merges: Networks as ``merged`` of :func:`correction_statistics`.
        expert: As there.
        head: As there.
        inputs: As there.
        runtime: As there.
        batch_size: As there.
        description: As there.
    """
    width = _width(expert, head)
    statistics = [CorrectionStatistics(_width(merged, head), width) for merged in merges]
    for network in (*merges, expert):
        network.eval()
    slices = list(inputs.batches(batch_size))
    mine = list(runtime.share(slices))
    with torch.inference_mode():
        for rows in runtime.progress(mine, len(mine), description):
            batch = runtime.to_device(inputs[rows])
            with runtime.precision():
                theirs = representation(expert, head, batch)
                ours = [representation(merged, head, batch) for merged in merges]
            # All tokens of a sample go to the same fold.
            indices = torch.arange(rows.start, rows.stop)
            indices = indices.repeat_interleave(len(theirs) // len(indices))
            for one, features in zip(statistics, ours, strict=True):
                one.update(features, theirs, indices=indices)
    return [one.all_reduced(runtime.reduce) for one in statistics]


def _width(network: nn.Module, head: str) -> int:
    return first_linear(get_submodule(network, head), head)[1].in_features
