"""What a layer's weight is multiplied with: the input columns of one call of a module."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_merge.layers.sites import CONVOLUTIONS, Site

PROBED = 8
"""Samples on which the arrangement of a norm's channels is checked."""
NOT_AFFINE = "does more than scale and shift its normalised input, such as an activation"


@torch.no_grad()
def input_columns(
    site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], samples: int
) -> tuple[Tensor, bool]:
    """Columns of one call, without the constant of the bias.

    Args:
        site: The layer.
        module: Its module.
        args: What it is called with.
        kwargs: What it is called with, by name.
        samples: Samples in the batch.

    Returns:
        ``(n, L, g, i)`` with L columns a sample (tokens, patches); ``(n, L, g)`` of normalised
        channels for a norm; ``(n, L)`` of row numbers for an embedding. And whether the columns
        belong to samples: if the module's input has no sample dimension, n is 1.

    Raises:
        ValueError: If a norm's output is no affine function of its normalised input.
    """
    if isinstance(module, nn.MultiheadAttention):
        value, first = _attention_input(site, module, args, kwargs), module.batch_first
        if value.ndim == 2:
            value = value[None]
        elif not first:
            value = value.transpose(0, 1)
        rows, owned = by_sample(value, samples)
        return rows[:, :, None], owned
    value = args[0] if args else next(iter(kwargs.values()))
    if site.kind == "linear":
        rows, owned = by_sample(value, samples)
        return rows[:, :, None], owned
    if site.kind == "embedding":
        rows, owned = by_sample(value[..., None], samples)
        return rows[..., 0], owned
    if site.kind == "norm":
        return by_sample(normalised(site, module, value), samples)
    assert isinstance(module, CONVOLUTIONS)
    return by_sample_unfolded(module, value, samples)


def by_sample(value: Tensor, samples: int) -> tuple[Tensor, bool]:
    """Rows of the last dimension grouped by sample: ``(n, L, d)``, and whether they have one.

    Samples come first, perhaps split into windows; a tensor whose *second* dimension is the number
    of samples is sequence-first. Anything else belongs to no sample: n is 1.
    """
    width = value.shape[-1]
    if value.ndim >= 2 and len(value) and len(value) % samples == 0:
        return value.reshape(samples, -1, width), True
    if value.ndim >= 3 and value.shape[1] == samples:
        return value.transpose(0, 1).reshape(samples, -1, width), True
    return value.reshape(1, -1, width), False


def by_sample_unfolded(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, value: Tensor, samples: int
) -> tuple[Tensor, bool]:
    """Patches of a convolution, ``(n, L, groups, C / groups * kernel)``."""
    dims = len(module.kernel_size)
    if value.ndim == dims + 1:
        value = value[None]
    patches = unfold(module, value)
    owned = len(patches) % samples == 0
    lead = samples if owned else 1
    return patches.reshape(lead, -1, *patches.shape[2:]), owned


def unfold(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, value: Tensor) -> Tensor:
    """Patches that a convolution sees: ``(n, positions, groups, C / groups * kernel)``.

    Args:
        module: Any stride, dilation, groups, padding and padding mode.
        value: Its input, ``(n, C, *size)``.
    """
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(value, module._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        reach = dilation * (size - 1) + 1
        # Adds a last dimension of the window; every dilation-th entry of it is used.
        padded = padded.unfold(axis, reach, stride)[..., ::dilation]
    n, channels = padded.shape[:2]
    dims = len(module.kernel_size)
    places, window = padded.shape[2 : 2 + dims], padded.shape[2 + dims :]
    grouped = padded.reshape(n, module.groups, channels // module.groups, *places, *window)
    order = (0, *range(3, 3 + dims), 1, 2, *range(3 + dims, 3 + 2 * dims))
    return grouped.permute(order).reshape(n, places.numel(), module.groups, -1)


def normalised(site: Site, module: nn.Module, value: Tensor) -> Tensor:
    """Input of a norm's scale and shift, channels last.

    Found by running the module with other scales and shifts, so that subclasses with another
    arrangement of channels are served as well.

    Raises:
        ValueError: If its output is no affine function of its normalised input.
    """
    found = _normalised(module, value)
    if found is None:
        raise ValueError(
            f"layer '{site.name}' ({type(module).__name__}) {NOT_AFFINE}. Leave such layers to the "
            "fallback: take 'norm' out of layers."
        )
    return found


def is_affine(module: nn.Module, value: Tensor) -> bool:
    """Whether a norm is a scale and a shift of its normalised input, and nothing more."""
    with torch.no_grad():
        return _normalised(module, value) is not None


def _normalised(module: nn.Module, value: Tensor) -> Tensor | None:
    like = module.weight
    assert isinstance(like, Tensor)
    width, zeros = len(like), torch.zeros_like(like)
    plain = _rescaled(module, torch.ones_like(like), zeros)(value)
    # How a norm arranges its channels shows on a few samples.
    some = slice(None) if value.ndim < 3 else slice(0, PROBED)
    # Whole numbers of both signs: exact in half precision, and a nonlinearity would show.
    probe = (torch.arange(width, device=like.device) % 17 - 8).to(like.dtype)
    scaled = _rescaled(module, probe, zeros)(value[some]).double()
    tolerance = 1e-2 if plain.dtype in (torch.float16, torch.bfloat16) else 1e-5
    for axis in range(1, plain.ndim):
        if plain.shape[axis] == width:
            last = plain.movedim(axis, -1)
            few = last[some].double()
            error = (scaled.movedim(axis, -1) - few * probe.double()).abs().max()
            if float(error) <= tolerance * 8 * (1 + float(few.abs().max())):
                return last
    return None


def _rescaled(module: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """The same norm with another scale and shift; the module itself is not changed."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    twin._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if module._parameters.get("bias") is not None:
        twin._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    return _silent(twin)


def _silent(twin: nn.Module) -> nn.Module:
    """A shallow copy without the hooks of its original."""
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        setattr(twin, kind, type(getattr(twin, kind))())
    return twin


def _attention_input(
    site: Site, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor:
    if site.part != "out":
        index = ("q", "k", "v").index(site.part)
        name = ("query", "key", "value")[index]
        return args[index] if index < len(args) else kwargs[name]
    # What enters the output projection: the same attention with an identity in its place.
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    width = module.embed_dim
    identity = nn.modules.linear.NonDynamicallyQuantizableLinear(width, width, bias=True)
    like = module.out_proj.weight
    identity.weight = nn.Parameter(torch.eye(width).to(like), requires_grad=False)
    identity.bias = nn.Parameter(torch.zeros(width).to(like), requires_grad=False)
    twin._modules["out_proj"] = identity
    return _silent(twin)(*args, **kwargs)[0]
