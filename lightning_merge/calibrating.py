"""Passes over calibration inputs: the statistics of the correction."""

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
    dims = [first_linear(get_submodule(net, head), head)[1].in_features for net in (merged, expert)]
    statistics = CorrectionStatistics(*dims)
    merged.eval()
    expert.eval()
    slices = list(inputs.batches(batch_size))
    mine = list(runtime.share(slices))
    with torch.inference_mode():
        for rows in runtime.progress(mine, len(mine), description):
            batch = runtime.to_device(inputs[rows])
            with runtime.precision():
                ours = representation(merged, head, batch)
                theirs = representation(expert, head, batch)
            # All tokens of a sample go to the same fold.
            indices = torch.arange(rows.start, rows.stop)
            indices = indices.repeat_interleave(len(ours) // len(indices))
            statistics.update(ours, theirs, indices=indices)
    return statistics.all_reduced(runtime.reduce)
