"""Merging methods: each a frozen dataclass of hyper-parameters with one ``merge``."""

from lightning_merge.methods.average import Average
from lightning_merge.methods.base import CalibratedMethod, Calibration, MergeMethod, WeightMethod
from lightning_merge.methods.task_arithmetic import TaskArithmetic

__all__ = [
    "Average",
    "CalibratedMethod",
    "Calibration",
    "MergeMethod",
    "TaskArithmetic",
    "WeightMethod",
]
