"""A :class:`~lightning_merge.runtime.Runtime` from a Trainer, so that any strategy serves."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from tqdm import tqdm

from lightning_merge.runtime import Runtime


def runtime_of(trainer: Trainer) -> Runtime:
    """This process's place among those of a Trainer.

    Forward passes of calibration and sweeps run in the dtype of the weights, without autocast:
    the closed form is worth no less than the features it is made from.
    """
    strategy = trainer.strategy

    def add_up(value: Tensor) -> Tensor:
        # The strategy's default is the mean, and it works in place.
        return strategy.reduce(value.to(strategy.root_device, copy=True), reduce_op="sum")

    return Runtime(
        device=strategy.root_device,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        reduce=add_up,
        barrier=strategy.barrier,
        progress=lambda items, total, text: _progress(trainer, items, total, text),
    )


def on_first(trainer: Trainer, work: Callable[[], Any]) -> Any:
    """Run ``work`` on the first process and give its result, or its error, to all of them.

    The result must be small plain data. Without this, an error on one process would leave the
    others waiting.
    """
    result: Any = None
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            result = work()
        except Exception as caught:
            error = caught
    message = None if error is None else f"{type(error).__name__}: {error}"
    result, message = trainer.strategy.broadcast((result, message))
    if error is not None:
        raise error
    if message is not None:
        raise RuntimeError(f"the first process failed: {message}")
    return result


def _progress(
    trainer: Trainer, items: Iterable[Any], total: int, description: str
) -> Iterator[Any]:
    bar = trainer.progress_bar_callback
    if bar is None or getattr(bar, "is_disabled", False) or not trainer.is_global_zero:
        yield from items
        return
    if not isinstance(bar, RichProgressBar):
        yield from tqdm(items, total=total or None, desc=description, leave=False)
        return
    # During a fit the Trainer's own display is still live: add a line to it.
    live = bar.progress is not None and bar.progress.live.is_started
    display = bar.progress if live else Progress(transient=True)
    assert display is not None
    if not live:
        display.start()
    line = display.add_task(description, total=total or None)
    try:
        for item in items:
            yield item
            display.update(line, advance=1)
    finally:
        display.refresh()
        if not live:
            display.stop()


class ShardedBatchSampler:
    """Every ``world_size``-th batch; nothing padded, nothing repeated, and a share may be empty."""

    def __init__(self, batches: Sequence[list[int]], runtime: Runtime) -> None:
        self._batches = list(runtime.share(batches))

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def sharded(loader: Iterable[Any], runtime: Runtime) -> Iterable[Any]:
    """This process's share of a loader's batches, in the dataset's order, each sample once."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader if runtime.world_size == 1 else runtime.share(loader)
    order = BatchSampler(
        SequentialSampler(cast("Sized", loader.dataset)), loader.batch_size or 1, drop_last=False
    )
    return DataLoader(
        loader.dataset,
        batch_sampler=ShardedBatchSampler(list(order), runtime),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
    )
