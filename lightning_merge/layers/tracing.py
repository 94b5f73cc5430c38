"""The order in which layers run, which of them read the same tensor, and blocks in a row."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge.layers.columns import NOT_AFFINE, is_affine
from lightning_merge.layers.sites import Site
from lightning_merge.networks import call_network


@dataclass(frozen=True)
class Group:
    """Layers that are solved from one pass: they read the same tensor."""

    sites: tuple[Site, ...]
    calls: int
    """Calls of their modules in one forward pass."""
    block: str | None
    """The block that they belong to, if all do."""


@dataclass(frozen=True)
class Trace:
    """What one forward pass showed."""

    groups: tuple[Group, ...]
    """In the order of first execution."""
    unused: tuple[Site, ...]
    """Layers that did not run."""
    refused: Mapping[str, str]
    """Norms that do more than scale and shift, such as those with an activation inside: why."""
    chained: Mapping[str, str]
    """Blocks by the block whose output they take over, with all else the same."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """All layers that ran, in order."""
        return tuple(site for group in self.groups for site in group.sites)


@dataclass
class _Call:
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keys: tuple[object, ...]
    output: Any = None


def trace(network: nn.Module, sites: Sequence[Site], batch: Any) -> Trace:
    """Run one batch and record what ran when.

    Args:
        network: The network, in eval mode.
        sites: Layers to look at.
        batch: A small batch for :func:`lightning_merge.networks.call_network`.
    """
    modules = {name for site in sites for name in site.modules}
    blocks = _block_candidates(network, modules)
    layer_calls = _recorded(network, modules, blocks, batch)
    calls, block_calls = layer_calls
    count: dict[str, int] = {}
    for call in calls:
        count[call.name] = count.get(call.name, 0) + 1
    once = [name for name in blocks if sum(c.name == name for c in block_calls) == 1]
    first = {name: index for index, name in reversed(list(enumerate(c.name for c in calls)))}
    used = [site for site in sites if any(name in first for name in site.modules)]
    refused = {site.name: why for site in used if (why := _refusal(network, site, calls))}
    ran = [site for site in used if site.name not in refused]
    ran.sort(key=lambda site: (min(first[n] for n in site.modules if n in first), _late(site)))
    keys = {call.name: call.keys for call in calls}
    groups: list[Group] = []
    for members in _sharing(ran, keys, count):
        called = {name for site in members for name in site.modules if name in count}
        groups.append(
            Group(
                sites=tuple(members),
                calls=sum(count[name] for name in called),
                block=_block_of(members, once),
            )
        )
    return Trace(
        groups=tuple(groups),
        unused=tuple(site for site in sites if site not in used),
        refused=refused,
        chained=_chained([call for call in block_calls if call.name in once]),
    )


def _refusal(network: nn.Module, site: Site, calls: Sequence[_Call]) -> str | None:
    if site.kind != "norm":
        return None
    call = next(call for call in calls if call.name in site.modules)
    module = network.get_submodule(call.name)
    value = call.args[0] if call.args else next(iter(call.kwargs.values()))
    return None if is_affine(module, value) else f"{type(module).__name__} {NOT_AFFINE}"


def _late(site: Site) -> int:
    return int(site.part == "out")  # runs in the same module, after q, k and v


def _sharing(
    ran: list[Site], keys: Mapping[str, tuple[object, ...]], count: Mapping[str, int]
) -> list[list[Site]]:
    """Consecutive layers of one kind that read the very same tensor, each called once."""
    shared: list[list[Site]] = []
    for site in ran:
        if shared and _same_input(shared[-1][-1], site, keys, count):
            shared[-1].append(site)
        else:
            shared.append([site])
    return shared


def _same_input(
    one: Site, other: Site, keys: Mapping[str, tuple[object, ...]], count: Mapping[str, int]
) -> bool:
    names = [*one.modules, *other.modules]
    if one.kind != other.kind or "out" in (one.part, other.part):
        return False
    if one.modules == other.modules:
        return True  # q, k and v of one attention
    single = one.kind == "linear" and len(names) == 2 and all(count[n] == 1 for n in names)
    return single and keys[names[0]] == keys[names[1]]


def _block_candidates(network: nn.Module, modules: set[str]) -> list[str]:
    """Innermost children of module lists that hold two or more layers."""
    found = []
    for name, module in network.named_modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            for child in module._modules:
                path = f"{name}.{child}" if name else child
                if sum(m.startswith(f"{path}.") for m in modules) >= 2:
                    found.append(path)
    return [path for path in found if not any(o.startswith(f"{path}.") for o in found)]


def _block_of(sites: Sequence[Site], blocks: Sequence[str]) -> str | None:
    names = [name for site in sites for name in site.modules]
    for block in blocks:
        if all(name.startswith(f"{block}.") for name in names):
            return block
    return None


def _chained(calls: Sequence[_Call]) -> dict[str, str]:
    chained = {}
    for before, after in pairwise(calls):
        takes_over = bool(after.args) and after.args[0] is _first(before.output)
        rest = [*before.args[1:], *before.kwargs.values()]
        others = [*after.args[1:], *after.kwargs.values()]
        same = before.kwargs.keys() == after.kwargs.keys() and len(rest) == len(others)
        if takes_over and same and all(_same(a, b) for a, b in zip(rest, others, strict=True)):
            chained[before.name] = after.name
    return chained


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    plain = (bool, int, float, str, type(None))
    return isinstance(a, plain) and isinstance(b, plain) and a == b


def _key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[object, ...]:
    value = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(value, Tensor):
        return (id(value),)
    # The version tells a tensor that was changed in place from what it was before.
    return (value.data_ptr(), value.shape, value.stride(), value._version)


def _recorded(
    network: nn.Module, modules: set[str], blocks: Sequence[str], batch: Any
) -> tuple[list[_Call], list[_Call]]:
    calls: list[_Call] = []
    block_calls: list[_Call] = []
    fused = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)

        def watch(name: str, into: list[_Call], keep: bool) -> None:
            module = network.get_submodule(name)

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                # Arguments are held, so that no address is used twice.
                into.append(_Call(name, args, kwargs, _key(args, kwargs)))

            def after(_: nn.Module, args: Any, output: Any) -> None:
                next(c for c in reversed(into) if c.name == name).output = output

            handle = module.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
            if keep:
                stack.callback(module.register_forward_hook(after).remove)

        for name in sorted(modules):
            watch(name, calls, keep=False)
        for name in blocks:
            watch(name, block_calls, keep=True)
        with torch.no_grad():
            call_network(network, batch)
    return calls, block_calls
