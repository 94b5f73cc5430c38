"""How far the representation of a network is from the experts', on one fold of the inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_merge.functional.sums import fold_of
from lightning_merge.methods.calibrated import Calibration
from lightning_merge.networks import call_network, get_submodule, recording, set_submodule


@torch.inference_mode()
def output_error(
    network: nn.Module,
    calibration: Calibration,
    tasks: Sequence[str],
    preference: Tensor,
    num_folds: int | None,
    fold: int | None = 0,
) -> float:
    r"""Preference-weighted relative error of the representation.

    .. math:: \sum_t p_t \|Z_t - Z_t^{expert}\|^2 / \|Z_t^{expert}\|^2

    Args:
        network: With the backbone to judge, on the runtime's device; its head is replaced.
        calibration: Experts and inputs.
        tasks: In the order of the preference.
        preference: (T,).
        num_folds: Folds of the samples.
        fold: The samples that count; None counts all.
    """
    runtime, path = calibration.runtime, calibration.head
    error = 0.0
    for task, weight in zip(tasks, preference.tolist(), strict=True):
        expert = calibration.network(task)
        set_submodule(network, path, get_submodule(expert, path))
        sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
        for rows in calibration.slices(task):
            batch = runtime.to_device(calibration.inputs[task][rows])
            ours, theirs = (_representation(net, path, batch) for net in (network, expert))
            indices = torch.arange(rows.start, rows.stop)
            chosen = torch.ones(len(indices), dtype=torch.bool)
            if fold is not None:
                chosen = fold_of(indices, num_folds or 1) == fold
            # All tokens of a sample go to the same fold.
            mask = chosen.repeat_interleave(len(ours) // len(indices)).to(runtime.device)
            sums[0] += (ours - theirs)[mask].square().sum()
            sums[1] += theirs[mask].square().sum()
        sums = runtime.reduce(sums)
        error += weight * float(sums[0] / sums[1].clamp_min(torch.finfo(torch.float64).tiny))
    return error


def _representation(network: nn.Module, path: str, batch: object) -> Tensor:
    with recording(get_submodule(network, path), path) as seen:
        call_network(network, batch)
    return torch.cat(seen).double()
