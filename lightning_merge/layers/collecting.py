"""Sums of layers over the calibration inputs, from the experts' passes or the merged network's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_merge.layers.capture import hooked
from lightning_merge.layers.coordinates import Coordinates, by_row, outputs
from lightning_merge.layers.sites import Site
from lightning_merge.layers.statistics import LayerSums, Picked, Sampling, pick, real_tokens
from lightning_merge.layers.streams import Inputs, Stream
from lightning_merge.layers.tracing import Group
from lightning_merge.networks import call_network


class Matrices(Protocol):
    """What is asked of the weights, layer by layer."""

    def matrix(self, site: Site, task: str | None = None) -> Tensor:
        """Matrix of a layer in an expert, or in the base: (g, o, i), float64, on the CPU."""

    def coordinates(self, site: Site) -> Coordinates | None:
        """What a layer's columns are replaced by; None keeps them."""


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
    matrices: Matrices,
    options: Collecting,
) -> dict[str, LayerSums]:
    """Sums of one expert's own inputs of every layer, from one pass of this process's batches.

    They are not summed over the processes yet.
    """
    device = inputs.runtime.device
    sums = {site.name: _empty(site, matrices, options, False, device) for site in sites}
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
            _add(sums[site.name], columns, drawn[key], options, matrices.coordinates(site))

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
    matrices: Matrices,
    options: Collecting,
    skip_fold: int | None = None,
) -> dict[str, LayerSums]:
    """Sums of the layers of a group on the merged network's inputs, for one task.

    Args:
        group: The layers.
        task: Whose inputs.
        merged: The merged network as far as it is done.
        expert: The expert of the task, whose outputs are the targets; None for ``same_input``.
        matrices: Of the base and of the experts.
        options: What is collected.
        skip_fold: Samples of this fold are left out.
    """
    inputs = merged.inputs
    device = inputs.runtime.device
    sums = {
        site.name: _empty(site, matrices, options, expert is not None, device)
        for site in group.sites
    }
    maps = {
        site.name: (matrices.matrix(site).to(device), matrices.matrix(site, task).to(device))
        for site in group.sites
        if expert is not None and site.kind != "embedding"
    }
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
            into, coordinates = sums[site.name], matrices.coordinates(site)
            if expert is None or site.kind == "embedding":
                _add(into, columns, picked, options, coordinates)
            else:
                both = (columns, other)
                _add_residuals(into, both, maps[site.name], picked, options, coordinates)
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


def _add(
    sums: LayerSums,
    columns: Tensor,
    picked: Picked,
    options: Collecting,
    coordinates: Coordinates | None,
) -> None:
    if sums.site.kind == "embedding":
        sums.add_numbers(columns.reshape(-1)[picked.keep], picked)
    elif coordinates is None:
        sums.add(design(sums.site, columns, picked, options.bias), picked)
    else:
        given = coordinates.stacked().to(columns.device)
        for piece in coordinates.pieces(picked):
            sums.add(outputs(given, design(sums.site, columns, piece, options.bias)), piece)


def _add_residuals(
    sums: LayerSums,
    columns: tuple[Tensor, Tensor],
    maps: tuple[Tensor, Tensor],
    picked: Picked,
    options: Collecting,
    coordinates: Coordinates | None,
) -> None:
    """Add columns of the merged network and of the expert, with the residuals to reach."""
    (ours, theirs), (base, expert) = columns, maps
    given = None if coordinates is None else coordinates.stacked().to(ours.device)
    for piece in [picked] if coordinates is None else coordinates.pieces(picked):
        x = design(sums.site, ours, piece, options.bias)
        targets = design(sums.site, theirs, piece, options.bias) @ expert.mT
        residuals = targets - x @ base.mT
        if given is None:
            sums.add(x, piece, residuals, targets)
        else:
            sums.add(outputs(given, x), piece, by_row(residuals), by_row(targets))


def _received(
    stream: Stream, group: Group, task: str, number: int, rows: slice
) -> list[tuple[Site, Tensor, bool]]:
    found: list[tuple[Site, Tensor, bool]] = []

    def receive(site: Site, columns: Tensor, owned: bool) -> None:
        # Cloned: a layer may be followed by one that works in place.
        found.append((site, columns.clone(), owned))

    stream.run(group, task, number, rows, receive)
    return found


def _without(picked: Picked, fold: int) -> Picked:
    rest = picked.folds != fold
    keep = picked.keep.clone()
    keep[picked.keep.nonzero()[~rest]] = False
    return Picked(keep=keep, folds=picked.folds[rest], weights=picked.weights[rest])


def _empty(
    site: Site,
    matrices: Matrices,
    options: Collecting,
    targets: bool,
    device: torch.device,
) -> LayerSums:
    coordinates = matrices.coordinates(site)
    g, o, i = matrices.matrix(site).shape
    return LayerSums(
        site,
        (g, o, i) if coordinates is None else coordinates.seen_shape,
        num_folds=options.sampling.num_folds,
        targets=targets and site.kind != "embedding",
        residual_gram=options.residual_gram,
        device=device,
        elements=() if coordinates is None else coordinates.names,
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
