"""Accuracy against seconds at toy size, and lists on the command line."""

import json
import sys

import pytest

from benchmarks import accuracy_seconds, results
from benchmarks.suites import build
from lightning_merge.methods import Average, RegMean
from tests.benchmarks.test_suites import TOY


@pytest.fixture
def experts(tmp_path):
    return build("toy", 1, tmp_path, TOY)


def test_accuracy_against_seconds(experts, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    monkeypatch.setattr(accuracy_seconds, "WEIGHTS_ALONE", {"average": Average()})
    monkeypatch.setattr(accuracy_seconds, "CLOSED_FORM", {"RegMean": RegMean()})
    found = accuracy_seconds.defaultdict(lambda: accuracy_seconds.defaultdict(list))
    accuracy_seconds.measure(experts, [1, 2], [8], found)
    assert len(found) == 1 + 2 + 2 * 2 + 1
    accuracy_seconds.draw({"toy": found}, tmp_path / "picture.png")
    accuracy_seconds._write({"toy": found}, [1], "seconds")
    assert (tmp_path / "picture.png").read_bytes()[1:4] == b"PNG"
    written = (tmp_path / "seconds.md").read_text()
    for row in ("AdaMerging, 2 steps", "RegMean, 8 inputs", "RegMean, all inputs"):
        assert f"| {row} |" in written


def test_lists_on_the_command_line(monkeypatch, capsys):
    def main(names: list[str] = ["x"], seeds: list[int] = [0], other: str = "o") -> None:  # noqa: B006
        print(json.dumps([names, seeds, other]))

    for words, expected in (
        ([], [["x"], [0], "o"]),
        (
            ["--names", "a", "b, c", "--seeds", "1", "2", "--other", "p"],
            [["a", "b, c"], [1, 2], "p"],
        ),
        (["--seeds", "[3]", "--other=q"], [["x"], [3], "q"]),
        (["--names", "a"], [["a"], [0], "o"]),
    ):
        monkeypatch.setattr(sys, "argv", ["main", *words])
        results.run(main)
        assert json.loads(capsys.readouterr().out) == expected
