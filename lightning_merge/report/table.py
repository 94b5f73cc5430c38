"""The table at the end of every run: reference rows by task, raw and normalized."""

from typing import TYPE_CHECKING

from lightning_merge.pareto.sweep_result import SweepResult

if TYPE_CHECKING:
    from rich.table import Table

ROW_LABELS = {
    "experts": "experts",
    "base": "base, experts' heads",
    "uncorrected": "uncorrected merge",
    "equal": "corrected, equal",
    "priority": "corrected, priority",
    "one_hot": "corrected, one-hot",
    "per_task": "corrected, per task",
}
"""How a person reads the names of the reference rows."""

WIDEST_AS_COLUMNS = 10
"""More tasks than this stand as lines, with the reference rows as columns."""


CAPTION = (
    "Priority and one-hot show each task under its own preference; per task folds each head with "
    "its own map, the ceiling where the task of an input is known."
)


def console_table(result: SweepResult) -> "Table":
    """Reference rows of a sweep for the terminal: 8 tasks fit in 100 columns.

    Each task stands under its own preference in the rows priority and one-hot. Values in percent
    where they are fractions.
    """
    from rich import box
    from rich.table import Table

    head, blocks = table_cells(result)
    table = Table(
        title=result.method,
        caption=CAPTION,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
        header_style="bold",
    )
    for index, name in enumerate(head):
        table.add_column(
            name, justify="right" if index else "left", no_wrap=not index, overflow="fold"
        )
    for block, lines in blocks.items():
        table.add_row(f"[bold]{block}[/bold]")
        for line in lines:
            table.add_row(*line, style="bold cyan" if line[0] == ROW_LABELS["equal"] else None)
        table.add_section()
    return table


def markdown_table(result: SweepResult) -> str:
    """The same table in Markdown, one block of lines raw and one normalized."""
    head, blocks = table_cells(result)
    rows = []
    for block, lines in blocks.items():
        rows += [f"| **{block}** |" + " |" * (len(head) - 1)]
        rows += ["| " + " | ".join(line) + " |" for line in lines]
    rule = "| --- |" + " ---: |" * (len(head) - 1)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *rows]) + "\n"


def unit(result: SweepResult) -> str:
    """The metric with its unit, for instance ``accuracy (%)``; ``mse, lower is better``."""
    if not result.higher_is_better:
        return f"{result.metric}, lower is better"
    return f"{result.metric} (%)" if is_fraction(result) else result.metric


def is_fraction(result: SweepResult) -> bool:
    """Whether all values lie in [0, 1], so that a person wants to read them in percent."""
    rows = [result.raw, *result.references.values()]
    return result.higher_is_better and all(bool(((v >= 0) & (v <= 1)).all()) for v in rows)


def table_cells(result: SweepResult) -> tuple[list[str], dict[str, list[list[str]]]]:
    """Header, and the text of the lines of each block: raw, normalized."""
    rows = result.rows()
    blocks = {}
    for block, values in (
        (unit(result), rows),
        ("normalized (%)", {k: result.normalize(v) for k, v in rows.items()}),
    ):
        percent = block.endswith("(%)")
        blocks[block] = [
            [ROW_LABELS[name], *(show(x, percent) for x in (*row.tolist(), float(row.mean())))]
            for name, row in values.items()
        ]
    head = ["", *result.tasks, "mean"]
    if len(result.tasks) <= WIDEST_AS_COLUMNS:
        return head, blocks
    turned = {
        block: [list(line) for line in zip(head[1:], *(line[1:] for line in lines), strict=True)]
        for block, lines in blocks.items()
    }
    return ["", *(ROW_LABELS[name] for name in rows)], turned


def show(value: float, percent: bool) -> str:
    """One cell; ``-`` where there is no value."""
    if value != value:
        return "-"
    return f"{100 * value:.1f}" if percent else f"{value:.4g}"
