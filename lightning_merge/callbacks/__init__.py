"""Callbacks that plug into any LightningModule."""

from lightning_merge.callbacks.merge import MergeCallback

__all__ = ["MergeCallback"]
