"""The tables of data-driven methods at toy size."""

import json
import sys

import pytest

from benchmarks import accuracy_seconds, data_methods, results
from benchmarks.data_methods import METHODS, RECIPES, Row, measure, order
from lightning_merge.methods import AdaMerging, Fisher, GreedySoup
from tests.benchmarks.test_suites import TOY, build

SMALL = {
    "average": METHODS["average"],
    "Fisher": Fisher(samples=4),
    "greedy soup": GreedySoup(),
    "AdaMerging": AdaMerging(steps=2),
}


@pytest.fixture
def experts(tmp_path):
    return build("toy", 1, tmp_path, TOY)


def test_table_of_methods(experts, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    monkeypatch.setattr(data_methods, "METHODS", SMALL)
    rows = {name: Row() for name in SMALL}
    measure(experts, list(SMALL), rows)
    for row in rows.values():
        assert len(row.values) == 1 + 3 * len(RECIPES) + 2
        assert row.values["seconds"][0] > 0
        assert all(len(values) == 1 for values in row.values.values())
    data_methods._write({"toy": rows}, [1], "table")
    text = (tmp_path / "table.md").read_text()
    assert all(f"| {name} |" in text for name in SMALL)
    assert "Order expected" in text


def test_a_method_that_does_not_fit_is_named(experts, monkeypatch):
    monkeypatch.setattr(data_methods, "METHODS", {"slerp": _slerp()})
    rows = {"slerp": Row()}
    experts.tasks["c"] = experts.tasks["a"]
    experts.pool.add("c", _expert_of(experts, "a"), calibration=experts.tasks["a"].calibration)
    measure(experts, ["slerp"], rows)
    assert "two" in rows["slerp"].problem


def _slerp():
    from lightning_merge.methods import Slerp

    return Slerp()


def _expert_of(experts, task):
    from benchmarks.features import calibration_of

    return calibration_of(experts, [task]).network(task)


def test_order_names_what_differs():
    rows = {name: Row() for name in data_methods.EXPECTED}
    for value, name in enumerate(data_methods.EXPECTED):
        rows[name].values["uncorrected"].append(0.5 + 0.05 * value)
    assert "Differs" not in order(rows)
    assert "RegMean++ and TSV-M should be about equal; they are +0.050 apart." in order(rows)
    rows["TIES"].values["uncorrected"] = [0.3]
    text = order(rows)
    assert "Differs: average is above TIES by 0.200" in text
    assert "TIES (0.300) < average (0.500)" in text


def test_accuracy_against_seconds(experts, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    monkeypatch.setattr(accuracy_seconds, "SINGLE", {"average": METHODS["average"]})
    found = accuracy_seconds.defaultdict(lambda: accuracy_seconds.defaultdict(list))
    accuracy_seconds.measure(experts, [1, 2], found)
    assert len(found) == 1 + 2 * 2 + 1
    accuracy_seconds.draw({"toy": found}, tmp_path / "picture.png")
    accuracy_seconds._write({"toy": found}, [1], "seconds")
    assert (tmp_path / "picture.png").read_bytes()[1:4] == b"PNG"
    assert "| AdaMerging, 2 steps |" in (tmp_path / "seconds.md").read_text()


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
