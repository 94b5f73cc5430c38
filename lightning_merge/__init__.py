"""Merge fine-tuned experts into one model that a preference vector steers."""

from lightning_merge.merged import MergedModel
from lightning_merge.merging import merge_experts
from lightning_merge.pool import ExpertPool
from lightning_merge.steered import SteeredModel

__all__ = ["ExpertPool", "MergedModel", "SteeredModel", "merge_experts"]
