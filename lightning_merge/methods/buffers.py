"""Telling a method which entries of a network are floating buffers, to be averaged."""

import glob
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from lightning_merge.methods.base import MergeMethod, WeightMethod
from lightning_merge.methods.stored import ExpertStore
from lightning_merge.methods.tall_store import TALLCompress

Method = TypeVar("Method", bound=MergeMethod | ExpertStore)


def knowing_buffers(method: Method, names: Sequence[str]) -> Method:
    """The method, and every method within it, with these names among its ``buffers``.

    A state dict does not tell buffers from parameters; a network does.
    """
    if not names:
        return method
    changes: dict[str, Any] = {
        field.name: _knowing(getattr(method, field.name), names) for field in fields(method)
    }
    if isinstance(method, (WeightMethod, TALLCompress)):
        changes["buffers"] = (*method.buffers, *(glob.escape(name) for name in names))
    return replace(method, **changes)


def _knowing(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, MergeMethod):
        return knowing_buffers(value, names)
    if isinstance(value, (tuple, list)):
        return type(value)(_knowing(item, names) for item in value)
    return value
