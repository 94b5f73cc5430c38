"""What a block is called with, copied with all that is in it, so that it can be called again."""

import copy
import types
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

STATELESS = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, type, Enum),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
    nn.Module,  # a part of the network: its weights are to follow the walk
)


class NotCopiedError(TypeError):
    """An argument is of a kind that no copy is known for; the message names its class."""


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a block's arguments with every tensor in them replaced.

    Blocks of decoders write into what they are called with: a cache of keys and values is an
    object with attributes that grow. Such objects are copied with all that their attributes hold,
    so that a block called twice finds the same both times. What occurs twice in ``value`` is one
    thing in the copy as well.

    Args:
        value: Tensors, numbers, containers and objects of plain attributes, nested.
        function: Called once for each tensor, in an order that depends on ``value`` alone.

    Raises:
        NotCopiedError: If there is something else, such as an object without attributes.
    """
    return _mapped(value, function, {})


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors that :func:`mapped` replaces, in its order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(value, note)
    return found


def _mapped(
    value: Any, function: Callable[[Tensor], Tensor], done: dict[int, tuple[Any, Any]]
) -> Any:
    if isinstance(value, STATELESS):
        return value
    if id(value) in done:
        return done[id(value)][1]

    def inner(part: Any) -> Any:
        return _mapped(part, function, done)

    def note(twin: Any) -> Any:
        # with the original, whose address must not be used again meanwhile
        done[id(value)] = (value, twin)
        return twin

    if isinstance(value, Tensor):
        return note(function(value))
    if type(value) is dict:
        twin = note({})
        twin.update({key: inner(part) for key, part in value.items()})
        return twin
    if type(value) is list:
        twin = note([])
        twin.extend(inner(part) for part in value)
        return twin
    if type(value) is tuple:
        return note(tuple(inner(part) for part in value))
    if isinstance(value, (dict, list, tuple, set)) or not hasattr(value, "__dict__"):
        raise NotCopiedError(type(value).__name__)
    twin = note(copy.copy(value))
    twin.__dict__ = {name: inner(part) for name, part in vars(value).items()}
    return twin
