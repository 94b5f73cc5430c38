"""Merge fine-tuned experts into one model that a preference vector steers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_merge.merged import MergedModel
    from lightning_merge.merging import merge_experts
    from lightning_merge.pool import ExpertPool
    from lightning_merge.steered import SteeredModel

__all__ = ["ExpertPool", "MergedModel", "SteeredModel", "merge_experts"]

MODULES = {
    "ExpertPool": "pool",
    "MergedModel": "merged",
    "SteeredModel": "steered",
    "merge_experts": "merging",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: the methods alone need no pools and corrections."""
    if name not in MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
