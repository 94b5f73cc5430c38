import json

import pandas as pd
import pytest
import torch

from lightning_merge.pareto import (
    SweepResult,
    dirichlet,
    equal,
    hypervolume,
    one_hot,
    pairwise,
    priority,
    uniformity,
)

TASKS = ("cars", "digits", "leaves")
REFERENCES = {
    "experts": torch.tensor([0.9, 0.8, 1.0]),
    "base": torch.tensor([0.1, 0.3, 0.2]),
    "uncorrected": torch.tensor([0.6, 0.5, 0.64]),
}


def make_sweep(**changes):
    grid = torch.cat([equal(3), priority(3), one_hot(3), pairwise(3, 0, 1, 3), dirichlet(3, 6)])
    facts = {
        "tasks": TASKS,
        "metric": "accuracy",
        "preferences": grid,
        "kinds": ("equal", *["priority"] * 3, *["one_hot"] * 3, *["pairwise"] * 3, *["custom"] * 6),
        "favoured": (None, *TASKS, *TASKS, *[None] * 9),
        "raw": 0.6 + 0.2 * grid,
        "references": REFERENCES,
        "method": "TIES(density=0.2)",
        "timings": {"evaluate": 1.5},
        "versions": {"torch": "2.6.0"},
        "diagnostics": {"cars": {"beta": 0.01, "r2": 0.75}},
    }
    return SweepResult(**(facts | changes))


def test_normalized_is_over_the_expert_and_guards_zero():
    result = make_sweep()
    torch.testing.assert_close(
        result.normalized, result.raw / torch.tensor([0.9, 0.8, 1.0], dtype=torch.float64)
    )
    zero = make_sweep(references=REFERENCES | {"experts": torch.tensor([0.9, 0.0, 1.0])})
    assert zero.normalized.isnan().any(dim=0).tolist() == [False, True, False]
    assert any("zero (or less) on digits" in sentence for sentence in zero.warnings())
    summary = zero.summary()
    assert summary["rows"]["equal"]["normalized"]["digits"] is None
    assert summary["hypervolume"]["normalized"] is None
    json.dumps(summary, allow_nan=False)


def test_rows_take_each_task_under_its_own_preference():
    result = make_sweep()
    raw = result.raw
    rows = result.rows()
    assert list(rows) == ["experts", "base", "uncorrected", "equal", "priority", "one_hot"]
    torch.testing.assert_close(rows["equal"], raw[0])
    torch.testing.assert_close(rows["priority"], torch.stack([raw[1, 0], raw[2, 1], raw[3, 2]]))
    torch.testing.assert_close(rows["one_hot"], torch.stack([raw[4, 0], raw[5, 1], raw[6, 2]]))
    with_own = make_sweep(references=REFERENCES | {"per_task": torch.ones(3)})
    assert list(with_own.rows())[-1] == "per_task"


def test_rows_that_were_not_evaluated_are_left_out():
    result = make_sweep(kinds=("custom",) * 16, favoured=(None,) * 16)
    assert list(result.rows()) == ["experts", "base", "uncorrected"]
    kinds = ("equal", *["priority"] * 2, *["custom"] * 13)
    partial = make_sweep(kinds=kinds, favoured=(None, "cars", "digits", *[None] * 13))
    assert "priority" not in partial.rows()


def test_table_has_one_line_for_each_preference():
    result = make_sweep()
    table = result.table()
    assert len(table) == 16
    assert list(table.columns) == [
        "kind",
        "favoured",
        *[f"{kind}/{task}" for kind in ("preference", "raw", "normalized") for task in TASKS],
        "raw_mean",
        "normalized_mean",
    ]
    assert table["raw_mean"][0] == pytest.approx(0.6 + 0.2 / 3)
    assert table["normalized/digits"][5] == pytest.approx(1.0)


def test_summary_is_the_fixed_json():
    result = make_sweep()
    summary = result.summary()
    assert list(summary) == [
        "tasks",
        "metric",
        "higher_is_better",
        "normalization",
        "rows",
        "hypervolume",
        "uniformity",
        "alignment",
        "timings",
        "versions",
    ]
    assert list(summary["rows"]["equal"]) == ["raw", "raw_mean", "normalized", "normalized_mean"]
    assert summary["rows"]["experts"]["normalized_mean"] == pytest.approx(1.0)
    volume = summary["hypervolume"]["raw"]
    assert volume["value"] == pytest.approx(hypervolume(result.raw).value)
    assert (volume["reference_point"], volume["method"]) == ([0.0, 0.0, 0.0], "exact")
    inside = (result.preferences > 0).all(dim=1)
    expected = uniformity(result.preferences[inside], 1 - result.raw[inside]).mean()
    assert summary["uniformity"] == pytest.approx(float(expected))
    alignment = summary["alignment"]
    assert alignment["kendall_tau"]["per_task"]["cars"] == pytest.approx(1.0)
    assert alignment["monotonicity_violations"] == 0.0
    assert alignment["control_range"]["per_task"]["leaves"] == pytest.approx(0.2)


def test_save_and_load_give_the_same_sweep(tmp_path):
    result = make_sweep(references=REFERENCES | {"per_task": torch.full((3,), 0.77)})
    result.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "results.csv",
        "results.parquet",
        "summary.json",
    ]
    loaded = SweepResult.load(tmp_path)
    for name in ("preferences", "raw", "normalized"):
        assert torch.equal(getattr(loaded, name), getattr(result, name))
    for name in ("tasks", "metric", "kinds", "favoured", "method", "timings", "diagnostics"):
        assert getattr(loaded, name) == getattr(result, name)
    assert json.loads((tmp_path / "summary.json").read_text()) == loaded.summary()
    for frame in (
        pd.read_csv(tmp_path / "results.csv"),
        pd.read_parquet(tmp_path / "results.parquet"),
    ):
        assert list(frame.columns) == list(result.table().columns)
        assert frame["raw/digits"].tolist() == result.raw[:, 1].tolist()


def test_load_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="holds no finished sweep"):
        SweepResult.load(tmp_path)
    make_sweep().save(tmp_path)
    (tmp_path / "summary.json").unlink()  # killed before its end
    with pytest.raises(ValueError, match=r"holds no finished sweep.*lightning-merge sweep"):
        SweepResult.load(tmp_path)
    make_sweep().save(tmp_path)
    whole = (tmp_path / "results.parquet").read_bytes()
    (tmp_path / "results.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"results.parquet is not a readable sweep"):
        SweepResult.load(tmp_path)
    make_sweep().table().to_parquet(tmp_path / "results.parquet")  # a stranger's table
    with pytest.raises(ValueError, match=r"results.parquet is not a readable sweep"):
        SweepResult.load(tmp_path)


def test_load_refuses_a_newer_format(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_merge.pareto.sweep_result._FORMAT", 2)
    make_sweep().save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="newer format than this release reads"):
        SweepResult.load(tmp_path)


def test_unwritable_output_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write"):
        make_sweep().save(tmp_path / "file" / "sweep")


def test_warnings_name_a_merge_that_loses_to_the_base():
    assert make_sweep().warnings() == []
    strong = REFERENCES | {"base": torch.tensor([0.7, 0.65, 0.75])}
    sentences = make_sweep(references=strong).warnings()
    assert sentences[0] == (
        "The uncorrected merge loses to the base: mean accuracy 0.580 against 0.700."
    )
    assert "The corrected merge at equal preference loses to the base" in sentences[1]
    assert any(
        s.startswith("Worse than the base at equal preference: cars (0.667") for s in sentences
    )
    assert not any("one-hot" in sentence for sentence in sentences)


def test_warnings_name_the_tasks_that_the_correction_hurts():
    hurt = REFERENCES | {"uncorrected": torch.tensor([0.85, 0.5, 0.64])}
    sentences = make_sweep(references=hurt).warnings()
    assert sentences == [
        "Worse than the uncorrected merge at equal preference: cars (0.667 against 0.850).",
        "Worse than the uncorrected merge even under its own one-hot preference: cars (0.800 "
        "against 0.850).",
    ]


def test_losses_are_read_the_other_way_round():
    losses = make_sweep(
        metric="loss",
        higher_is_better=False,
        raw=1 - make_sweep().raw,
        references={name: 1.05 - row for name, row in REFERENCES.items()},
    )
    assert losses.warnings() == []
    summary = losses.summary()
    assert summary["hypervolume"]["raw"]["reference_point"] == pytest.approx([0.95, 0.75, 0.85])
    assert summary["uniformity"] == pytest.approx(make_sweep().summary()["uniformity"])
    assert summary["alignment"]["kendall_tau"]["mean"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("a", "a", "b")}, "different tasks"),
        ({"raw": torch.zeros(5, 3)}, r"raw must have shape \(16, 3\), found \(5, 3\)"),
        ({"raw": torch.full((16, 3), torch.nan)}, "raw holds a non-finite number at point 0"),
        ({"references": {}}, r"missing \['experts', 'base', 'uncorrected'\]"),
        ({"references": REFERENCES | {"other": torch.ones(3)}}, r"unknown \['other'\]"),
        ({"references": REFERENCES | {"base": torch.ones(2)}}, r"references\['base'\] must have"),
        ({"kinds": ("corner",) * 16}, r"kinds \['corner'\] are unknown"),
        ({"favoured": ("planes",) * 16}, r"unknown tasks \['planes'\]"),
    ],
)
def test_bad_results_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make_sweep(**changes)
