"""LightningModules and learning-rate schedules."""

from lightning_merge.modules.expert import ExpertModule
from lightning_merge.modules.image_tower import ImageTower
from lightning_merge.modules.schedules import OneCycle, WarmupCosine
from lightning_merge.modules.transformers import sequence_classifier

__all__ = ["ExpertModule", "ImageTower", "OneCycle", "WarmupCosine", "sequence_classifier"]
