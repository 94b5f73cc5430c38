"""Sums of layers over the calibration inputs, from the experts' passes or the merged network's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_merge.layers.capture import hooked
from lightning_merge.layers.sites import Site
from lightning_merge.layers.statistics import LayerSums, Picked, Sampling, pick, real_tokens
from lightning_merge.layers.streams import Inputs, Stream
from lightning_merge.layers.tracing import Group
from lightning_merge.networks import call_network

Matrix = Callable[[Site], Tensor]
"""The matrix of a layer, (g, o, i), float64, on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Collecting:
    """What is collected, and how."""

    sampling: Sampling
    bias: bool
    """Whether biases are merged with their weights, as a column of ones."""
    residual_gram: bool = False
    """Keep the second moments of the residuals where targets are given."""


def expert_sums(
    network: nn.Module,
    task: str,
    sites: Sequence[Site],
    inputs: Inputs,
    shape_of: Callable[[Site], tuple[int, int, int]],
    options: Collecting,
) -> dict[str, LayerSums]:
    """Sums of one expert's own inputs of every layer, from one pass of this process's batches.

    They are not summed over the processes yet.
    """
    device = inputs.runtime.device
    sums = {site.name: _empty(site, shape_of(site), options, False, device) for site in sites}
    slices = inputs.slices(task)
    for rows in inputs.runtime.progress(slices, len(slices), f"Inputs of {task}"):
        batch = inputs.batch(task, rows)
        indices, real = torch.arange(rows.start, rows.stop), real_tokens(batch)
        drawn: dict[tuple[torch.Size, bool], Picked] = {}  # the draw looks at nothing else

        def receive(
            site: Site,
            columns: Tensor,
            owned: bool,
            indices: Tensor = indices,
            real: Tensor | None = real,
            drawn: dict[tuple[torch.Size, bool], Picked] = drawn,
        ) -> None:
            _check_finite(columns, site, task)
            key = (columns.shape[:2], owned)
            if key not in drawn:
                drawn[key] = pick(columns, owned, indices, real, options.sampling)
            _add(sums[site.name], columns, drawn[key], options)

        with (
            torch.inference_mode(),
            inputs.runtime.precision(),
            hooked(network, sites, receive, samples=rows.stop - rows.start),
        ):
            call_network(network, batch)
    return sums


def group_sums(
    group: Group,
    task: str,
    merged: Stream,
    expert: Stream | None,
    shape_of: Callable[[Site], tuple[int, int, int]],
    matrices: tuple[Matrix, Matrix] | None,
    options: Collecting,
    skip_fold: int | None = None,
) -> dict[str, LayerSums]:
    """Sums of the layers of a group on the merged network's inputs, for one task.

    Args:
        group: The layers.
        task: Whose inputs.
        merged: The merged network as far as it is done.
        expert: The expert of the task, whose outputs are the targets; None for ``same_input``.
        shape_of: Shape of a layer's matrix.
        matrices: Of the base and of the expert, where there are targets.
        options: What is collected.
        skip_fold: Samples of this fold are left out.
    """
    inputs = merged.inputs
    device = inputs.runtime.device
    sums = {
        site.name: _empty(site, shape_of(site), options, expert is not None, device)
        for site in group.sites
    }
    maps = None if matrices is None else [_on(device, group, matrix) for matrix in matrices]
    for number, rows in merged.batches(task):
        real = real_tokens(inputs.batch(task, rows))
        indices = torch.arange(rows.start, rows.stop)
        ours = _received(merged, group, task, number, rows)
        theirs = ours if expert is None else _received(expert, group, task, number, rows)
        for (site, columns, owned), (_, other, _) in zip(ours, theirs, strict=True):
            _check_finite(columns, site, task)
            _check_finite(other, site, task)
            picked = pick(columns, owned, indices, real, options.sampling)
            if skip_fold is not None:
                picked = _without(picked, skip_fold)
            if expert is None or maps is None or site.kind == "embedding":
                _add(sums[site.name], columns, picked, options)
                continue
            x = design(site, columns, picked, options.bias)
            targets = design(site, other, picked, options.bias) @ maps[1][site.name].mT
            residuals = targets - x @ maps[0][site.name].mT
            sums[site.name].add(x, picked, residuals, targets)
    return sums


def design(site: Site, columns: Tensor, picked: Picked, bias: bool) -> Tensor:
    """Picked columns as ``(g, m, i)``, float64, with a last entry of ones for the bias."""
    flat = columns.flatten(0, 1)
    if not bool(picked.keep.all()):
        flat = flat.index_select(0, picked.keep.nonzero()[:, 0])
    if site.kind == "norm":
        flat = flat[..., None]
    if not (bias and site.biases):
        return flat.to(torch.float64).transpose(0, 1)
    extended = flat.new_empty(*flat.shape[:-1], flat.shape[-1] + 1, dtype=torch.float64)
    extended[..., :-1], extended[..., -1] = flat, 1
    return extended.transpose(0, 1)


def _add(sums: LayerSums, columns: Tensor, picked: Picked, options: Collecting) -> None:
    if sums.site.kind == "embedding":
        sums.add_numbers(columns.reshape(-1)[picked.keep], picked)
    else:
        sums.add(design(sums.site, columns, picked, options.bias), picked)


def _received(
    stream: Stream, group: Group, task: str, number: int, rows: slice
) -> list[tuple[Site, Tensor, bool]]:
    found: list[tuple[Site, Tensor, bool]] = []

    def receive(site: Site, columns: Tensor, owned: bool) -> None:
        # Cloned: a layer may be followed by one that works in place.
        found.append((site, columns.clone(), owned))

    stream.run(group, task, number, rows, receive)
    return found


def _on(device: torch.device, group: Group, matrix: Matrix) -> dict[str, Tensor]:
    return {site.name: matrix(site).to(device) for site in group.sites if site.kind != "embedding"}


def _without(picked: Picked, fold: int) -> Picked:
    rest = picked.folds != fold
    keep = picked.keep.clone()
    keep[picked.keep.nonzero()[~rest]] = False
    return Picked(keep=keep, folds=picked.folds[rest], weights=picked.weights[rest])


def _empty(
    site: Site,
    shape: tuple[int, int, int],
    options: Collecting,
    targets: bool,
    device: torch.device,
) -> LayerSums:
    return LayerSums(
        site,
        shape,
        num_folds=options.sampling.num_folds,
        targets=targets and site.kind != "embedding",
        residual_gram=options.residual_gram,
        device=device,
    )


def _check_finite(columns: Tensor, site: Site, task: str) -> None:
    # A sum shows NaN and infinity at a fraction of the cost; one that overflows is looked into.
    if not columns.is_floating_point() or bool(columns.sum().isfinite()):
        return
    if not bool(columns.isfinite().all()):
        raise ValueError(
            f"layer '{site.name}', task '{task}': the inputs hold NaN or infinity. Check the "
            "calibration inputs and the weights, or the precision of the pass."
        )
