"""The table of methods at toy size."""

import statistics
import sys

import pytest

from benchmarks import methods_table, results
from benchmarks.features import backbone, merge, references
from benchmarks.methods_table import (
    METHODS,
    RECIPES,
    Numbers,
    Row,
    measure,
    measured,
    order,
    page_numbers,
    write_page,
)
from benchmarks.suites import build
from lightning_merge import merge_experts
from lightning_merge.methods import (
    AdaMerging,
    Average,
    CalibratedMethod,
    Fisher,
    GreedySoup,
    Slerp,
    TaskArithmetic,
)
from tests.benchmarks.test_suites import TOY

SMALL = {
    "average": METHODS["average"],
    "Fisher": Row(Fisher(samples=4), "fisher"),
    "greedy soup": Row(GreedySoup()),
    "AdaMerging": Row(AdaMerging(steps=2)),
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return build("toy", 0, tmp_path_factory.mktemp("bench"), TOY)


@pytest.mark.filterwarnings("ignore")
def test_numbers_are_those_of_the_merged_model(experts):
    known = references(experts)
    numbers = measure(experts, known, Row(Average()))
    model = merge_experts(experts.pool, module=experts.template, check=False, report="off")
    accuracy = {}
    for kind, network_of in {
        "plain": lambda task: model.uncorrected(task),
        "priority": lambda task: model.with_preference(dict.fromkeys("ab", 0.5), task),
        "own": lambda task: model.with_preference({task: 1.0}, task),
    }.items():
        scores = []
        for task, data in experts.tasks.items():
            inputs, labels = data.test
            right = (network_of(task).eval()(inputs).argmax(1) == labels).double().mean()
            scores.append(float(right) / known.accuracy[task])
        accuracy[kind] = statistics.fmean(scores)
    assert numbers["uncorrected"] == pytest.approx(accuracy["plain"])
    # of two tasks, a priority of one half is the equal preference
    assert numbers["default, equal"] == pytest.approx(accuracy["priority"])
    assert numbers["default, priority"] == pytest.approx(accuracy["priority"])
    assert numbers["default, one-hot"] == pytest.approx(accuracy["own"])


def test_figures_are_kept_until_the_method_changes(experts, tmp_path):
    known, kept = references(experts), tmp_path / "suite" / "average.json"
    first = measured(lambda: experts, lambda: known, Row(Average()), kept)
    assert first["values"]["uncorrected"] > 0

    def never():
        raise AssertionError("measured again")

    assert measured(never, never, Row(Average()), kept) == first
    other = measured(lambda: experts, lambda: known, Row(TaskArithmetic(scale=0.0)), kept)
    assert other["values"]["uncorrected"] != first["values"]["uncorrected"]
    refused = measured(lambda: experts, lambda: known, Row(Slerp(), tasks=1), kept)
    assert "two" in refused["problem"]


class Halfway(CalibratedMethod):
    def merge(self, base, experts, calibration):
        assert next(iter(calibration.batches("a"))).shape[1:] == (6,)
        return TaskArithmetic(scale=0.5).merge(base, experts)


def test_methods_with_data_are_rows_like_others(experts):
    found, expected = (backbone(experts, m, limit=50) for m in (Halfway(), Average()))
    assert set(found) == set(expected)
    assert float((found["0.weight"] - expected["0.weight"]).abs().max()) < 1e-6
    merge(experts, Halfway(), references(experts, 50), limit=50)


def test_the_whole_command(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    monkeypatch.setattr(methods_table, "METHODS", SMALL)
    monkeypatch.setattr(methods_table, "PAGES", tmp_path)
    monkeypatch.setattr(
        methods_table, "build", lambda name, seed, root: build(name, seed, root, TOY)
    )
    for page in ("average", "fisher"):
        (tmp_path / f"{page}.md").write_text(f"a\n{methods_table.BEGIN}\n{methods_table.END}\n")
    methods_table.main(["toy"], [1, 2], list(SMALL), str(tmp_path), "table")
    text = (tmp_path / "table.md").read_text()
    assert "seeds 1, 2." in text
    assert all(f"| {name} |" in text for name in SMALL)
    assert all(f"{recipe}, priority" in text for recipe in RECIPES)
    assert "Order expected" in text
    assert "| toy | Fisher |" in (tmp_path / "fisher.md").read_text()
    (tmp_path / "methods_table" / "toy" / "2" / "Fisher.json").unlink()
    for seed in "12":
        (tmp_path / "methods_table" / "toy" / seed / "AdaMerging.json").unlink()
    methods_table.main(["toy"], [1, 2], list(SMALL), str(tmp_path), "kept", only_kept=True)
    kept = (tmp_path / "kept.md").read_text()
    assert "| Fisher (1 seed) |" in kept
    assert "AdaMerging" not in kept.partition("Here:")[2]
    line = next(line for line in text.splitlines() if line.startswith("| average |"))
    assert line in kept.splitlines()
    with pytest.raises(SystemExit, match="unknown methods"):
        methods_table.main(methods=["none"])


def test_a_method_that_does_not_fit_says_so(experts):
    with pytest.raises(ValueError, match="two"):
        measure(experts, references(experts), Row(Slerp(), tasks=1))


def test_order_names_what_differs():
    rows = {name: Numbers() for name in methods_table.EXPECTED}
    for value, name in enumerate(methods_table.EXPECTED):
        rows[name].values["uncorrected"].append(0.5 + 0.05 * value)
    assert "Differs" not in order(rows)
    assert "RegMean++ and TSV-M should be about equal; they are +0.050 apart." in order(rows)
    rows["TIES"].values["uncorrected"] = [0.3]
    text = order(rows)
    assert "Differs: average is above TIES by 0.200" in text
    assert "TIES (0.300) < average (0.500)" in text


def test_pages(tmp_path):
    rows = {name: Numbers() for name in METHODS}
    for numbers in rows.values():
        for key in (*methods_table.SHOWN, "seconds"):
            numbers.values[key] += [0.5, 0.6]
    page = tmp_path / "x.md"
    page.write_text(f"a\n{methods_table.BEGIN}\nold\n{methods_table.END}\nb\n")
    write_page(page, page_numbers("dare", {"toy": rows}, [0, 1]))
    written = page.read_text()
    assert [line.split(" | ")[1] for line in written.splitlines() if line.startswith("| toy")] == [
        "average",
        "DARE",
        "DARE-TIES",
    ]
    assert written.startswith("a\n")
    assert written.endswith("b\n")
    assert "old" not in written
    write_page(page, "again")
    assert "average" not in page.read_text()
    page.write_text("no place")
    with pytest.raises(ValueError, match="no place for its numbers"):
        write_page(page, "x")


def test_every_page_has_its_place():
    for row in METHODS.values():
        if row.page is not None:
            page = (methods_table.PAGES / f"{row.page}.md").read_text()
            assert methods_table.BEGIN in page
            assert methods_table.END in page
            assert "../results/methods.md" in page
