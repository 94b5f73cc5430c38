"""The table of methods at toy size."""

import statistics

import pytest

from benchmarks import methods_table
from benchmarks.features import backbone, merge, references
from benchmarks.methods_table import ROWS, Row, measure, page_numbers, sections, write_page
from benchmarks.suites import build
from lightning_merge import merge_experts
from lightning_merge.methods import Average, CalibratedMethod, TaskArithmetic
from tests.benchmarks.test_suites import TOY


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return build("toy", 0, tmp_path_factory.mktemp("bench"), TOY)


@pytest.mark.filterwarnings("ignore")
def test_numbers_are_those_of_the_merged_model(experts):
    known = references(experts, methods_table.LIMIT)
    numbers = measure(Row("Average", Average), experts, known)
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
    assert numbers.uncorrected == pytest.approx(accuracy["plain"])
    # of two tasks, a priority of one half is the equal preference
    assert numbers.corrected["default"] == pytest.approx(
        (accuracy["priority"], accuracy["priority"], accuracy["own"])
    )
    assert numbers.milliseconds > 0


class Halfway(CalibratedMethod):
    def merge(self, base, experts, calibration):
        assert next(iter(calibration.batches("a"))).shape[1:] == (6,)
        return TaskArithmetic(scale=0.5).merge(base, experts)


def test_methods_with_data_are_rows_like_others(experts):
    found, expected = (backbone(experts, m, limit=50) for m in (Halfway(), Average()))
    assert set(found) == set(expected)
    assert float((found["0.weight"] - expected["0.weight"]).abs().max()) < 1e-6
    merge(experts, Halfway(), references(experts, 50), limit=50)


@pytest.mark.filterwarnings("ignore")
def test_tables_and_pages(experts, tmp_path):
    numbers = measure(Row("Average", Average), experts, references(experts, methods_table.LIMIT))
    found = {"toy": {row.name: [numbers, numbers] for row in ROWS}}
    text = "\n".join(sections(found))
    assert text.count("\n| ") == len(ROWS) + 2
    page = tmp_path / "x.md"
    page.write_text(f"a\n{methods_table.BEGIN}\nold\n{methods_table.END}\nb\n")
    write_page(page, page_numbers("dare", found, [0, 1]))
    written = page.read_text()
    assert [line.split(" | ")[1] for line in written.splitlines() if line.startswith("| toy")] == [
        "Average",
        "DARE",
        "DARE, ties",
    ]
    assert written.startswith("a\n")
    assert written.endswith("b\n")
    assert "old" not in written
    write_page(page, "again")
    assert "Average" not in page.read_text()
    page.write_text("no place")
    with pytest.raises(ValueError, match="no place for its numbers"):
        write_page(page, "x")


def test_every_page_has_its_place():
    for row in ROWS:
        if row.page is not None:
            page = (methods_table.PAGES / f"{row.page}.md").read_text()
            assert methods_table.BEGIN in page
            assert methods_table.END in page
            assert "../results/methods.md" in page
