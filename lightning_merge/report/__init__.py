"""What a person sees of a merge and a sweep: tables, pictures, and a page to explore."""

from lightning_merge.report.interference_figure import interference_figure
from lightning_merge.report.live import LiveModel, build_live
from lightning_merge.report.plan_table import plan_text
from lightning_merge.report.table import console_table, markdown_table
from lightning_merge.report.writing import merge_pictures, write_report

__all__ = [
    "LiveModel",
    "build_live",
    "console_table",
    "interference_figure",
    "markdown_table",
    "merge_pictures",
    "plan_text",
    "write_report",
]
