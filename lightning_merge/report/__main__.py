"""Show the table of a finished sweep: ``python -m lightning_merge.report runs/glyphs/sweep``."""

import sys
from pathlib import Path

from rich.console import Console

from lightning_merge.pareto import SweepResult
from lightning_merge.report.table import console_table, markdown_table


def main(arguments: list[str]) -> int:
    """Print the table, as Markdown with ``--markdown``, and the paths of what the sweep wrote."""
    folders = [Path(word) for word in arguments if not word.startswith("--")]
    if len(folders) != 1:
        print("usage: python -m lightning_merge.report SWEEP [--markdown]", file=sys.stderr)  # noqa: T201
        return 2
    try:
        result = SweepResult.load(folders[0])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    if "--markdown" in arguments:
        print(markdown_table(result))  # noqa: T201
        return 0
    console = Console(width=max(100, Console().width))
    console.print(console_table(result))
    for name in ("results.csv", "front.png", "ternary.png", "response.png", "report.html"):
        if (folders[0] / name).exists():
            console.print(str(folders[0] / name), highlight=False)
    for warning in result.warnings():
        console.print(f"note: {warning}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
