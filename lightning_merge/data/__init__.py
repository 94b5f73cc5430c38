"""Data: tasks, and the suite that hands them to Lightning."""

from lightning_merge.data.glyphs import GlyphTask
from lightning_merge.data.suite import TaskSuite
from lightning_merge.data.task import Task

__all__ = ["GlyphTask", "Task", "TaskSuite"]
