"""Running independent decompositions side by side, one core each."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_on_cores(
    function: Callable[[Item], Result], items: Iterable[Item], *, size: int
) -> list[Result]:
    """Apply a function of tensors to each item, as many at once as torch has threads.

    One thread for each decomposition beats several threads inside one, since most of an
    eigenvalue solver is sequential. Results do not depend on the number of threads that run.

    Args:
        function: Called from several threads, with torch's own threads set to one.
        items: Its arguments.
        size: Entries of one item; small ones are not worth a thread.
    """
    threads = torch.get_num_threads()
    work = list(items)
    if threads == 1 or len(work) < 2 or size < 1 << 16:
        return [function(item) for item in work]
    try:
        with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
            return list(pool.map(function, work))
    finally:
        torch.set_num_threads(threads)  # the setting of the BLAS library is shared by all threads
