"""Running independent pieces of work side by side, one core each."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import local
from typing import Generic, Protocol, TypeVar, final, runtime_checkable

import torch

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)
Result = TypeVar("Result")


@runtime_checkable
class Indexed(Protocol[Item_co]):
    """What is read by number: a sequence, or the first dimension of a tensor."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item_co: ...


def map_on_cores(
    function: Callable[[Item], Result], items: Indexed[Item], *, size: int
) -> list[Result]:
    """Apply a function of tensors to each item, as many at once as torch has threads.

    One thread for each decomposition beats several threads inside one, since most of an
    eigenvalue solver is sequential. Results do not depend on the number of threads that run.

    Args:
        function: Called from several threads, with torch's own threads set to one.
        items: Its arguments; each is read where it is used, by the thread that uses it.
        size: Entries of one item; small ones are not worth a thread.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < 2 or size < 1 << 16:
        return [function(items[i]) for i in range(len(items))]
    try:
        with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
            return list(pool.map(lambda i: function(items[i]), range(len(items))))
    finally:
        torch.set_num_threads(threads)  # the setting of the BLAS library is shared by all threads


def in_order_on_cores(
    function: Callable[[Item], Result], items: Sequence[Item], sizes: Sequence[int]
) -> Iterator[Result]:
    """Yield a function's results in the items' order, while those of the next are worked on.

    As many items at once as torch has threads, with torch's own threads set to one meanwhile. What
    is begun and not taken is no larger than twice as many items of the largest size, so a reader
    that is slow does not fill the memory, and small items do not keep a core from the next large
    one.

    Args:
        function: Called from several threads.
        items: Its arguments.
        sizes: How large the result of each is, in any unit.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not items:
        yield from map(function, items)
        return
    begun: deque[tuple[int, Future[Result]]] = deque()
    held, room = 0, 2 * threads * max(sizes)
    pool = ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1))
    try:
        for item, size in zip(items, sizes, strict=True):
            while begun and (held + size > room or begun[0][1].done()):
                taken, result = begun.popleft()
                held -= taken
                yield result.result()
            begun.append((size, pool.submit(function, item)))
            held += size
        while begun:
            yield begun.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


@final
class PerThread(Generic[Result]):
    """One value for every thread that asks for it, such as room for its intermediates.

    Args:
        make: Makes the value of a thread when it first asks.
    """

    def __init__(self, make: Callable[[], Result]) -> None:
        self._make, self._local = make, local()

    def get(self) -> Result:
        """This thread's value."""
        if not hasattr(self._local, "value"):
            self._local.value = self._make()
        value: Result = self._local.value
        return value
