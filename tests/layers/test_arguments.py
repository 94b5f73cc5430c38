"""Copies of what a block is called with: nothing in them is the original's."""

import pytest
import torch
from torch import nn

from lightning_merge.layers.arguments import NotCopiedError, mapped, tensors_in


class Memory:
    """An object that holds tensors, as caches of keys and values do."""

    def __init__(self) -> None:
        self.layers = [{"keys": torch.ones(2)}, {"keys": torch.zeros(3)}]
        self.offset, self.kind = 3, Memory
        self.again = self.layers


def test_objects_are_copied_with_all_that_they_hold():
    memory, module = Memory(), nn.Linear(2, 2)
    x = torch.randn(4)
    given = ((x, (True, None)), {"memory": memory, "x": x, "module": module})
    (args, kwargs) = mapped(given, lambda value: value + 1)
    twin = kwargs["memory"]
    assert torch.equal(args[0], x + 1)
    assert kwargs["x"] is args[0]
    assert args[1] == (True, None)
    assert kwargs["module"] is module
    assert twin is not memory
    assert (twin.offset, twin.kind) == (3, Memory)
    assert twin.again is twin.layers
    twin.layers.append({"keys": torch.ones(1)})
    twin.layers[0]["keys"] += 5
    assert len(memory.layers) == 2
    assert torch.equal(memory.layers[0]["keys"], torch.ones(2))


def test_an_object_that_holds_itself_is_copied_once():
    memory = Memory()
    memory.owner = memory
    twin = mapped(memory, torch.clone)
    assert twin.owner is twin is not memory


def test_every_tensor_is_listed_once_in_the_order_of_the_copy():
    memory = Memory()
    x = torch.randn(4)
    order = []
    mapped((x, [memory, x]), lambda value: order.append(value) or value)
    found = tensors_in((x, [memory, x]))
    assert [len(value) for value in found] == [4, 2, 3]
    assert all(a is b for a, b in zip(found, order, strict=True))


@pytest.mark.parametrize("value", [iter([1]), {1}, torch.Generator()])
def test_what_has_no_known_copy_is_refused(value):
    with pytest.raises(NotCopiedError, match=type(value).__name__):
        mapped(((value,), {}), torch.clone)
