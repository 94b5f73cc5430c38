"""Data: tasks, and the suite that hands them to Lightning."""

from lightning_merge.data.glyphs import GlyphTask
from lightning_merge.data.images import ImageTask
from lightning_merge.data.suite import TaskSuite
from lightning_merge.data.task import Task
from lightning_merge.data.text import TextTask, Tokens
from lightning_merge.data.transforms import PlainTransform, TimmTransform

__all__ = [
    "GlyphTask",
    "ImageTask",
    "PlainTransform",
    "Task",
    "TaskSuite",
    "TextTask",
    "TimmTransform",
    "Tokens",
]
