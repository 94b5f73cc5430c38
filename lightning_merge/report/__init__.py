"""What a person sees of a sweep: the final table, the pictures, and a page to explore."""

from lightning_merge.report.live import LiveModel, build_live
from lightning_merge.report.plan_table import plan_text
from lightning_merge.report.table import console_table, markdown_table
from lightning_merge.report.writing import write_report

__all__ = [
    "LiveModel",
    "build_live",
    "console_table",
    "markdown_table",
    "plan_text",
    "write_report",
]
