"""Merging methods: each a frozen dataclass of hyper-parameters with one ``merge``."""

from lightning_merge.methods.average import Average
from lightning_merge.methods.base import CalibratedMethod, Calibration, MergeMethod, WeightMethod
from lightning_merge.methods.rules import Coefficient
from lightning_merge.methods.task_arithmetic import TaskArithmetic
from lightning_merge.methods.ties import TIES

__all__ = [
    "TIES",
    "Average",
    "CalibratedMethod",
    "Calibration",
    "Coefficient",
    "MergeMethod",
    "TaskArithmetic",
    "WeightMethod",
]
