"""Forward passes that hand the input columns of layers out, whole or only as far as needed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_merge.layers.columns import input_columns
from lightning_merge.layers.sites import Site

Receive: TypeAlias = Callable[[Site, Tensor, bool], None]
"""Takes a site, its columns of one call, and whether they belong to samples."""


class _Reached(Exception):  # noqa: N818 (no error: it ends a forward pass early)
    pass


@contextmanager
def hooked(
    network: nn.Module,
    sites: Sequence[Site],
    receive: Receive,
    *,
    samples: int,
    calls: int | None = None,
) -> Iterator[None]:
    """Hand the columns of ``sites`` to ``receive`` while the network runs; no hook stays behind.

    Args:
        network: The network, or the block that holds all modules of the sites.
        sites: Layers; their module names are relative to the network.
        receive: Called at every call of a layer.
        samples: Samples in the batch.
        calls: Ends the pass after as many module calls; None lets it run to its end.
    """
    by_module: dict[str, list[Site]] = {}
    for site in sites:
        for name in site.modules:
            by_module.setdefault(name, []).append(site)
    seen = 0

    def hook_of(mine: list[Site]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            nonlocal seen
            for site in mine:
                receive(site, *input_columns(site, module, args, kwargs, samples))
            seen += 1
            if calls is not None and seen >= calls:
                raise _Reached

        return hook

    handles = []
    # The fused path of torch's transformers runs no submodule, hence no hook.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for name, mine in by_module.items():
            module = network.get_submodule(name)
            handle = module.register_forward_pre_hook(hook_of(mine), with_kwargs=True)
            handles.append(handle)
        yield
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def stopped_at(
    network: nn.Module, name: str, take: Callable[[tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """End a forward pass where a module is called, and hand out what it is called with."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(args, kwargs)
        raise _Reached

    handle = network.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    except _Reached:
        pass
    finally:
        handle.remove()
