"""LightningModules and learning-rate schedules."""

from lightning_merge.modules.expert import ExpertModule
from lightning_merge.modules.schedules import OneCycle, WarmupCosine

__all__ = ["ExpertModule", "OneCycle", "WarmupCosine"]
