"""A :class:`~lightning_merge.runtime.Runtime` from a Trainer, so that any strategy serves."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler
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
        progress=partial(_progress, trainer),
    )


class FirstProcessError(RuntimeError):
    """Raised on the other processes when the first one failed; that one tells why."""


def on_first(trainer: Trainer, work: Callable[[], Any]) -> Any:
    """Run ``work`` on the first process and give its result, or its error, to all of them.

    The result must be small plain data. Without this, an error on one process would leave the
    others waiting.

    Raises:
        FirstProcessError: On the other processes, if the first one failed.
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
        raise FirstProcessError(f"the first process failed: {message}")
    return result


def _progress(
    trainer: Trainer,
    items: Iterable[Any],
    total: int,
    description: str,
    note: Callable[[Any], str] | None = None,
) -> Iterator[Any]:
    bar = trainer.progress_bar_callback
    if bar is None or getattr(bar, "is_disabled", False) or not trainer.is_global_zero:
        yield from items
        return
    if not isinstance(bar, RichProgressBar):
        with tqdm(items, total=total or None, desc=description, leave=False) as line:
            for item in line:
                if note is not None:
                    line.set_postfix_str(note(item), refresh=False)
                yield item
        return
    # During a fit the Trainer's own display is still live: add a line to it.
    live = bar.progress is not None and bar.progress.live.is_started
    display = bar.progress if live else Progress(transient=True)
    assert display is not None
    if not live:
        display.start()
    task = display.add_task(description, total=total or None)
    try:
        for item in items:
            if note is not None:
                display.update(task, description=f"{description} {note(item)}")
            yield item
            display.update(task, advance=1)
    finally:
        display.refresh()
        if not live:
            display.stop()


def sharded(loader: Iterable[Any], runtime: Runtime) -> Iterable[Any]:
    """This process's share of a loader's batches, in the dataset's order, each sample once.

    Nothing is padded and nothing repeated, so a share may be empty. A loader of an iterable
    dataset is read by every process, which keeps every ``world_size``-th batch.
    """
    order = reading_order(loader)
    if order is None:
        return loader if runtime.world_size == 1 else runtime.share(loader)
    assert isinstance(loader, DataLoader)
    return reordered(loader, order, runtime)


def reading_order(loader: Iterable[Any]) -> list[int] | None:
    """Indices that a loader reads of its dataset, sorted; ``None`` where it has no such thing.

    A loader shuffles, and in several processes it pads or repeats; its samples are the whole
    dataset, or those of a ``SubsetRandomSampler``.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    sampler: Any = loader.sampler
    # Lightning wraps the samplers it does not know for several processes.
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)
    if isinstance(sampler, SubsetRandomSampler):
        return sorted(int(index) for index in sampler.indices)
    return list(range(len(cast("Sized", loader.dataset))))


def reordered(
    loader: DataLoader[Any], order: Sequence[int], runtime: Runtime | None = None
) -> DataLoader[Any]:
    """Read some samples of a loader's dataset, in a given order: this process's share of batches.

    Batches are formed before they are shared, so that they do not depend on the number of
    processes.
    """
    runtime = runtime or Runtime()
    options: dict[str, Any] = {
        "collate_fn": loader.collate_fn,
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "worker_init_fn": loader.worker_init_fn,
    }
    if loader.batch_sampler is None:  # items of the dataset are batches
        share = list(runtime.share(order))
        return DataLoader(loader.dataset, batch_size=None, sampler=share, **options)
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    batches = [list(order[start : start + size]) for start in range(0, len(order), size)]
    return DataLoader(loader.dataset, batch_sampler=list(runtime.share(batches)), **options)
