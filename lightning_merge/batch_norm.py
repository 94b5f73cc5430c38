"""Batch-norm statistics of a merged network, estimated anew on calibration inputs."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_merge.calibration import CalibrationInputs
from lightning_merge.networks import call_network, named_state
from lightning_merge.runtime import Runtime


def reestimate_batch_norm(
    network: nn.Module,
    head: str,
    inputs: Mapping[str, CalibrationInputs],
    runtime: Runtime,
    *,
    batch_size: int,
) -> bool:
    """Replace the running statistics of the backbone's batch norms by those of the merged model.

    Averaged statistics belong to no network and are ruinous; these are the exact pooled mean and
    variance over mixed batches with the same number of samples of every task, as a batch norm in
    training sees them. Works in place.

    Args:
        network: Network with the merged backbone, on the runtime's device.
        head: Dotted path of the head, whose own batch norms stay.
        inputs: Unlabeled inputs by task.
        runtime: This process's place among others; the result is the same on each.
        batch_size: Samples a forward pass, of all tasks together.

    Returns:
        Whether there was a batch norm with running statistics.

    Raises:
        ValueError: If the tasks' inputs have different shapes, so that batches cannot be mixed.
    """
    layers = [
        module
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and not f"{name}.".startswith(f"{head}.")
    ]
    if not layers:
        return False
    each = max(1, batch_size // len(inputs))
    shared = min(len(samples) for samples in inputs.values())
    starts = list(range(0, shared, each))
    sums = [torch.zeros(2, m.num_features, dtype=torch.float64) for m in layers]
    count = torch.zeros((), dtype=torch.int64)
    network.eval()
    with ExitStack() as restore, torch.inference_mode():
        for layer in layers:
            restore.callback(setattr, layer, "momentum", layer.momentum)
            if layer.num_batches_tracked is not None:  # processes run different numbers of batches
                kept = layer.num_batches_tracked.clone()
                restore.callback(layer.num_batches_tracked.copy_, kept)
            layer.momentum = 1.0  # the running statistics are then those of the last batch
            layer.train()
        mine = list(runtime.share(starts))
        for start in runtime.progress(mine, len(mine), "Re-estimating batch norm"):
            rows = slice(start, min(start + each, shared))
            batch = runtime.to_device(_mixed([samples[rows] for samples in inputs.values()]))
            size = (rows.stop - rows.start) * len(inputs)
            if size < 2:
                continue
            with _recorded_sizes(layers) as sizes, runtime.precision():
                call_network(network, batch)
            for layer, total, values in zip(layers, sums, sizes, strict=True):
                mean, biased = _moments(layer, values)
                total[0] += size * mean
                total[1] += size * (biased + mean.square())
            count += size
    count = runtime.reduce(count.to(runtime.device)).cpu()
    for layer, total in zip(layers, sums, strict=True):
        mean, second = runtime.reduce(total.to(runtime.device)).cpu() / count
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(mean)
        layer.running_var.copy_((second - mean.square()).clamp_min(0))
        layer.eval()
    return True


def batch_norm_state(network: nn.Module, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Current running statistics of a network among ``names``, on the CPU."""
    return {
        name: value.detach().cpu().clone()
        for name, value in named_state(network).items()
        if name in names and name.rpartition(".")[2] in ("running_mean", "running_var")
    }


def _moments(layer: _BatchNorm, values: int) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean = layer.running_mean.double().cpu()
    # torch keeps the unbiased variance; sums need the biased one.
    return mean, layer.running_var.double().cpu() * ((values - 1) / values)


class _recorded_sizes:  # noqa: N801 (a context manager, used as a function)
    """Number of values a channel that each layer saw in the last forward pass."""

    def __init__(self, layers: list[_BatchNorm]) -> None:
        self._layers = layers
        self._sizes = [0] * len(layers)

    def __enter__(self) -> list[int]:
        self._handles = [
            layer.register_forward_pre_hook(self._hook(index))
            for index, layer in enumerate(self._layers)
        ]
        return self._sizes

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int) -> Any:
        def record(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._sizes[index] = args[0].numel() // args[0].shape[1]

        return record


def _mixed(batches: list[Any]) -> Any:
    try:
        if isinstance(batches[0], Mapping):
            return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        return torch.cat(batches)
    except RuntimeError as error:
        raise ValueError(
            "batch-norm statistics are re-estimated on mixed batches, but the tasks' inputs have "
            f"different shapes ({error}). Resize them alike, or choose batch_norm='average'."
        ) from error
