import csv
import json
import math

import pytest
import torch

from lightning_merge.cli import main
from lightning_merge.diagnosing import diagnose_experts
from lightning_merge.merging import calibration_for
from lightning_merge.methods import Average, OutputProjection, TaskArithmetic
from lightning_merge.methods.layer_diagnosis import BASES
from lightning_merge.report.diagnosis_figure import write_diagnosis_picture
from lightning_merge.runtime import Runtime
from tests.layers.networks import case, experts_of, mlp
from tests.methods.test_layer_methods import pool  # noqa: F401 (a fixture)
from tests.methods.test_projection import losses


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    network = mlp(8, 6).eval()
    experts = experts_of(network, 3, 0.3)
    inputs = {task: torch.randn(60, 6) + 0.3 * i for i, task in enumerate(experts)}
    return network, experts, inputs


@pytest.fixture(scope="module")
def diagnosis(setting):
    network, experts, inputs = setting
    return diagnose_experts(experts, inputs, base=network, head="4", batch_size=16)


def test_shares_are_monotone_and_in_the_unit_interval(diagnosis):
    assert [layer.name for layer in diagnosis.layers] == ["0", "2"]
    for layer in diagnosis.layers:
        shares = layer.in_sample
        for coarse, fine in (("task_global", "task"), ("task", "block"), ("block", "row")):
            assert shares[coarse] <= shares[fine] + 1e-9
        for name in BASES:
            assert shares[name] <= shares["full"] + 1e-9
            assert layer.held_out[name] <= 1
        assert shares["task"] >= 0
        assert shares["full"] <= 1
        assert all(share <= shares["full"] + 1e-9 for share in layer.heuristics.values())
        assert layer.held_out["full"] <= shares["full"] + 1e-9


def test_the_parts_add_up_and_agree_with_the_methods(setting, diagnosis):
    network, experts, inputs = setting
    found = calibration_for(experts, inputs, base=network, head="4", batch_size=16)
    for basis in ("task", "row", "full"):
        method = OutputProjection(basis=basis, mode="parallel", ridge=0.0, safeguard=False)
        _, reports = method.project(found.base, found.experts, found.calibration)
        for report, layer in zip(reports, diagnosis.layers, strict=True):
            assert report.captured == pytest.approx(layer.in_sample[basis], abs=1e-9)
    for name in ("Average()", "TaskArithmetic(scale=0.3)"):
        assert sum(diagnosis.split("row", name).values()) == pytest.approx(1)
    state = Average().merge(found.base, found.experts)
    for layer in diagnosis.layers:
        share = losses(layer.name, found.base, found.experts, experts, found.calibration, state)
        captured = 1 - sum(share.values()) / 3
        assert layer.heuristics["Average()"] == pytest.approx(captured, abs=1e-6)


def test_the_folds_shares_are_those_of_fits_without_them(setting):
    """Brute force on activations: folds by the samples' numbers."""
    import numpy as np

    from lightning_merge.functional.sums import fold_of

    network, experts, inputs = setting
    found = diagnose_experts(experts, inputs, base=network, head="4", num_folds=3)
    layer = found.layers[0]
    base = torch.cat([network[0].weight, network[0].bias[:, None]], 1).detach().double().numpy()
    deltas, xs = [], []
    for task, expert in experts.items():
        own = torch.cat([expert[0].weight, expert[0].bias[:, None]], 1).detach().double().numpy()
        deltas.append(own - base)
        xs.append(np.concatenate([inputs[task].double().numpy(), np.ones((60, 1))], 1))
    fold = fold_of(torch.arange(60), 3).numpy()
    scales = [1 / ((x @ d.T) ** 2).sum() for x, d in zip(xs, deltas, strict=True)]
    error = 0.0
    for f in range(3):
        A, b, rows, targets = [], [], [], []
        for x, d, s in zip(xs, deltas, scales, strict=True):
            train, test = x[fold != f] * s**0.5, x[fold == f] * s**0.5
            A.append(np.stack([(train @ e.T).ravel() for e in deltas], 1))
            b.append((train @ d.T).ravel())
            rows.append(np.stack([(test @ e.T).ravel() for e in deltas], 1))
            targets.append((test @ d.T).ravel())
        alpha = np.linalg.lstsq(np.concatenate(A), np.concatenate(b), rcond=None)[0]
        left = np.concatenate(rows) @ alpha - np.concatenate(targets)
        error += (left**2).sum()
    # The default ridge of 1e-6 is all that differs.
    assert layer.held_out["task"] == pytest.approx(1 - error / 3, abs=1e-5)


def test_files_and_picture(diagnosis, tmp_path):
    csv_path, json_path = diagnosis.save(tmp_path)
    rows = list(csv.DictReader(csv_path.open()))
    assert [row["layer"] for row in rows] == ["0", "2"]
    assert float(rows[0]["in_sample/full"]) == pytest.approx(
        diagnosis.layers[0].in_sample["full"], rel=1e-5
    )
    content = json.loads(json_path.read_text())
    assert content["recommended_basis"] in BASES
    assert set(content["representation"]) == {"base", "Average()", "TaskArithmetic(scale=0.3)"}
    assert len(content["recommendation"]) >= 3
    picture = write_diagnosis_picture(diagnosis, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_update_for_all_is_told_from_conflict(setting):
    network, experts, inputs = setting
    same = dict.fromkeys(experts, experts["task1"])
    alike = diagnose_experts(same, inputs, base=network, head="4")
    assert alike.score("task_global") == pytest.approx(1, abs=1e-6)
    assert alike.basis == "task_global"
    assert any("One coefficient a task is enough" in line for line in alike.recommendation())


def test_layers_that_did_not_change_have_nothing_to_capture():
    network = mlp().eval()
    unchanged = experts_of(network, 2, 0.0)
    inputs = {task: torch.randn(20, 4) for task in unchanged}
    found = diagnose_experts(unchanged, inputs, base=network, head="4")
    assert found.layers == []
    assert math.isnan(found.score("full"))


def test_fewer_samples_are_spread_over_the_set(setting):
    network, experts, inputs = setting
    few = {task: x[torch.arange(20) * 3] for task, x in inputs.items()}
    expected = diagnose_experts(experts, few, base=network, head="4")
    found = diagnose_experts(experts, inputs, base=network, head="4", num_samples=20)
    assert found.as_dict() == expected.as_dict()
    more = diagnose_experts(experts, few, base=network, head="4", num_samples=21)
    assert more.as_dict() == expected.as_dict()
    with pytest.raises(ValueError, match="num_samples=0: expected at least 1"):
        diagnose_experts(experts, inputs, base=network, head="4", num_samples=0)


def test_bars_name_the_stage_and_the_layer(setting):
    network, experts, inputs = setting
    shown = {}

    def progress(items, total, description, note=None):
        items = list(items)
        assert len(items) == total
        shown[description] = [note(item) for item in items] if note else []
        return items

    runtime = Runtime(progress=progress)
    diagnose_experts(experts, inputs, base=network, head="4", runtime=runtime)
    assert shown["Diagnosing layers"] == ["0", "2"]
    assert shown["Correcting"] == ["base", "Average()", "TaskArithmetic(scale=0.3)"]
    assert {f"{stage} {task}" for stage in ("Inputs of", "Calibrating") for task in experts} <= set(
        shown
    )


def test_the_command_line(pool, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("sys.argv", ["lightning-merge"])
    main(
        [
            *("diagnose", "--trainer.accelerator=cpu", "--trainer.devices=1"),
            *(f"--pool={pool.path}", f"--output={tmp_path / 'out'}"),
            "--num_samples=50",
            '--heuristics=["TaskArithmetic"]',
        ]
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"diagnosis.json", "layers.csv", "diagnosis.png"}


def test_bad_input():
    _, _, _, experts = case(mlp(), "4", (4,))
    with pytest.raises(ValueError, match="no calibration inputs for task0"):
        diagnose_experts(experts, base=mlp(), head="4", heuristics=[TaskArithmetic()])
