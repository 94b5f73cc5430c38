import pytest
import torch
from rich.console import Console

from lightning_merge.report import console_table, markdown_table
from tests.report.synthetic import make_sweep


def printed(result, width):
    console = Console(width=width, force_terminal=False, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(console_table(result))
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [100, 120])
def test_eight_tasks_fit_in_one_line_a_row(width):
    result = make_sweep(8)
    lines = printed(result, width)
    for task in result.tasks:
        assert sum(task in line.split() for line in lines) == 1
    equal = [line for line in lines if "corrected, equal" in line]
    assert len(equal) == 2
    cells = equal[0].split()[2:]
    expected = [*result.rows()["equal"].tolist(), float(result.rows()["equal"].mean())]
    assert cells == [f"{100 * value:.1f}" for value in expected]
    normalized = equal[1].split()[2:]
    assert normalized[0] == f"{100 * result.normalize(result.rows()['equal'])[0]:.1f}"


def test_many_tasks_stand_as_lines():
    result = make_sweep(20, points=2)
    lines = printed(result, 120)
    line = next(line for line in lines if "task_07" in line)
    expected = [f"{100 * float(row[7]):.1f}" for row in result.rows().values()]
    assert line.split() == ["task_07", *expected]


def test_markdown_has_both_blocks_and_every_row():
    result = make_sweep(3)
    lines = markdown_table(result).splitlines()
    assert lines[0] == "|  | latin | greek | cyrillic | mean |"
    assert {line.count("|") for line in lines} == {6}
    assert sum("corrected, one-hot" in line for line in lines) == 2
    assert "| experts | 100.0 | 100.0 | 100.0 | 100.0 |" in lines


def test_losses_and_missing_values_are_shown_as_they_are():
    result = make_sweep(2, metric="loss", higher_is_better=False)
    assert "**loss, lower is better**" in markdown_table(result)
    references = dict(result.references)
    references["experts"] = torch.tensor([0.0, 0.5])
    text = markdown_table(make_sweep(2, references=references))
    assert "| experts | - | 100.0 | - |" in text
