import threading
import time

import pytest
import torch

from lightning_merge.functional.parallel import PerThread, in_order_on_cores


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_and_few_wait(threads):
    begun = []

    def work(item):
        begun.append(item)
        assert torch.get_num_threads() == 1
        time.sleep(0.02 if item == 0 else 0.0)
        return item * item

    found = in_order_on_cores(work, range(20), [1] * 20)
    assert next(found) == 0
    time.sleep(0.05)
    assert len(begun) <= 2 * threads + 1  # a reader that is slow does not fill the memory
    assert list(found) == [item * item for item in range(1, 20)]
    assert sorted(begun) == list(range(20))
    assert torch.get_num_threads() == threads


def test_small_items_do_not_keep_a_core_from_large_ones():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    last = threading.Event()

    def work(item):
        if item == 0:
            assert last.wait(10)  # until the other core has come to the second large item
        if item == 30:
            last.set()
        return item

    try:
        sizes = [100, *[1] * 29, 100]
        assert list(in_order_on_cores(work, range(31), sizes)) == list(range(31))
    finally:
        torch.set_num_threads(before)


def test_an_error_comes_through_and_threads_are_as_before(threads):
    def work(item):
        if item == 3:
            raise ValueError("the fourth")
        return item

    found = in_order_on_cores(work, range(9), [1] * 9)
    with pytest.raises(ValueError, match="the fourth"):
        list(found)
    assert torch.get_num_threads() == threads
    found = in_order_on_cores(work, range(3), [1] * 3)
    next(found)
    found.close()  # as a reader that stops early does
    assert torch.get_num_threads() == threads


def test_each_thread_has_a_value_of_its_own():
    room = PerThread(object)
    found = []

    def ask():
        found.append((room.get(), room.get()))

    workers = [threading.Thread(target=ask) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(first is second for first, second in found)
    assert found[0][0] is not found[1][0]
