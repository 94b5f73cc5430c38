"""Calibration inputs brought to a layer: by whole passes, or resumed at the block it is in."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_merge.layers.arguments import NotCopiedError, mapped, tensors_in
from lightning_merge.layers.capture import Receive, hooked, stopped_at
from lightning_merge.layers.tracing import Group
from lightning_merge.networks import call_network
from lightning_merge.runtime import Runtime


class Inputs(Protocol):
    """What is asked of calibration inputs: this process's batches of a task."""

    @property
    def runtime(self) -> Runtime:
        """Where the work runs."""

    def slices(self, task: str) -> list[slice]:
        """Batches as slices of samples."""

    def batch(self, task: str, rows: slice) -> Any:
        """One batch, on the device."""


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Where the inputs of the current block are kept."""

    limit_gigabytes: float = 4.0
    """Host memory for all tasks and both networks; above it every layer takes whole passes."""
    dtype: torch.dtype | None = None
    """Floating tensors are kept in this dtype; None keeps theirs, which changes nothing."""


Held = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with."""
Dtypes = list[torch.dtype]


@dataclass
class Stream:
    """One network that takes the inputs of every task to the current layer.

    Args:
        network: Its weights; they may change between layers that were passed.
        inputs: Calibration inputs.
        chained: From the trace.
        cache: Options of the block cache.
        load: Fills the network's part with this prefix (or all, for ``""``) with the weights of a
            task; None where one network serves all tasks.
    """

    network: nn.Module
    inputs: Inputs
    tasks: tuple[str, ...]
    chained: Mapping[str, str]
    cache: CacheOptions = field(default_factory=CacheOptions)
    load: Callable[[str, str], None] | None = None
    _block: str | None = None
    _held: dict[tuple[str, int], tuple[Held, Dtypes]] = field(default_factory=dict)
    _loaded: tuple[str, str] | None = None
    _refused: bool = False
    """Whether a block was called with something that cannot be held."""

    @property
    def cached(self) -> bool:
        """Whether the current block's inputs are held."""
        return self._block is not None

    def enter(self, block: str | None) -> None:
        """Bring every input to a block; does nothing inside the block that is entered already."""
        if block == self._block:
            return
        resumed = self._block is not None and self.chained.get(self._block) == block
        previous, self._block = self._block, None
        held = self._held
        self._held = {}
        if block is None or self._refused:
            return
        try:
            self._hold(block, previous, held if resumed else None)
        except NotCopiedError as error:
            self._held, self._refused = {}, True
            warnings.warn(
                f"block '{block}' is called with a {error}, which cannot be kept for another call: "
                "every layer takes whole passes instead, which are slower.",
                stacklevel=2,
            )

    def _hold(
        self, block: str, previous: str | None, held: dict[tuple[str, int], Any] | None
    ) -> None:
        """Keep what the block is called with; ``held`` is that of the block before it."""
        resumed = held is not None
        limit = self.cache.limit_gigabytes * 2**30
        size = 0
        for task in self.tasks:
            self._fill(task, f"{previous}." if resumed else "")
            for number, rows in enumerate(self.inputs.slices(task)):
                if held is not None:
                    found = self._through(str(previous), held.pop((task, number)))
                else:
                    found = self._until(block, task, rows)
                self._held[task, number] = found
                size += _bytes(found[0])
                if size > limit:
                    self._held = {}
                    return
        self._block = block

    def run(self, group: Group, task: str, number: int, rows: slice, receive: Receive) -> None:
        """Run one batch up to the layers of a group and hand their columns out."""
        runtime = self.inputs.runtime
        held = self._held.get((task, number)) if group.block == self._block else None
        with (
            torch.inference_mode(),
            runtime.precision(),
            hooked(
                self.network,
                group.sites,
                receive,
                samples=rows.stop - rows.start,
                calls=group.calls,
            ),
        ):
            if held is None or group.block is None:
                self._fill(task, "")
                call_network(self.network, self.inputs.batch(task, rows))
            else:
                self._fill(task, f"{group.block}.")
                args, kwargs = self._restored(held)
                self.network.get_submodule(group.block)(*args, **kwargs)

    def batches(self, task: str) -> Iterator[tuple[int, slice]]:
        """This process's batches of a task, numbered."""
        return enumerate(self.inputs.slices(task))

    def _fill(self, task: str, prefix: str) -> None:
        if self.load is not None and self._loaded not in ((task, prefix), (task, "")):
            self.load(task, prefix)
            self._loaded = (task, prefix)

    def _until(self, block: str, task: str, rows: slice) -> tuple[Held, Dtypes]:
        found: list[tuple[Held, Dtypes]] = []

        def take(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(self._kept((args, kwargs)))

        runtime = self.inputs.runtime
        with torch.inference_mode(), runtime.precision(), stopped_at(self.network, block, take):
            call_network(self.network, self.inputs.batch(task, rows))
        return found[0]

    def _through(self, block: str, held: tuple[Held, Dtypes]) -> tuple[Held, Dtypes]:
        runtime = self.inputs.runtime
        args, kwargs = self._restored(held)
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.inference_mode(), runtime.precision():
                output = self.network.get_submodule(block)(*args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
        output = output[0] if isinstance(output, tuple) else output
        return self._kept(((output, *args[1:]), kwargs))

    def _kept(self, held: Held) -> tuple[Held, Dtypes]:
        def keep(value: Tensor) -> Tensor:
            # Cloned: a network may go on to change its activations in place.
            copied = value.detach().clone().cpu()
            narrow = self.cache.dtype is not None and copied.is_floating_point()
            return copied.to(self.cache.dtype) if narrow else copied

        return mapped(held, keep), [value.dtype for value in tensors_in(held)]

    def _restored(self, held: tuple[Held, Dtypes]) -> Held:
        # Blocks may work in place: what is held must not change.
        device, dtypes = self.inputs.runtime.device, iter(held[1])
        return mapped(held[0], lambda value: value.to(device, next(dtypes), copy=True))


def _bytes(held: Held) -> int:
    return sum(value.numel() * value.element_size() for value in tensors_in(held))
