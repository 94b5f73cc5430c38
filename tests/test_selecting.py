import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_merge import ExpertPool, MergedModel, merge_experts
from lightning_merge.correction import CorrectionOptions
from lightning_merge.functional.sums import fold_of
from lightning_merge.merging import measure
from lightning_merge.methods import Average, TaskArithmetic
from lightning_merge.networks import representation
from lightning_merge.selecting import (
    CORRECTIONS,
    brief,
    corrections_with,
    default_candidates,
    score_merge,
    select_from,
    select_merge,
)
from lightning_merge.trainer import MergeTrainer
from tests.networks import MLP, make, tuned

FIXED = CorrectionOptions(
    beta=0.5,
    beta_mode="absolute",
    prior="identity",
    task_scale="none",
    metric="representation",
)
HEAD = CorrectionOptions(metric="head", prior="procrustes", beta=1e-8)


@pytest.fixture
def setting():
    base, head, shape = make("mlp")
    experts = {task: tuned(base, seed) for seed, task in enumerate("abc")}
    inputs = {task: 3 * torch.randn(n, *shape) for task, n in zip("abc", (60, 43, 37), strict=True)}
    return base, head, experts, inputs


def test_the_score_is_the_error_on_folds_left_out(setting):
    base, head, experts, inputs = setting
    model = merge_experts(experts, None, inputs, base=base, head=head, correction=FIXED)
    errors = score_merge(model, Average()).errors
    features, folds, heads = {}, {}, {}
    for task in experts:
        zm = representation(model.uncorrected(task), head, inputs[task]).detach().double().numpy()
        zi = representation(experts[task], head, inputs[task]).detach().double().numpy()
        features[task] = zm, zi
        folds[task] = fold_of(torch.arange(len(zm)), 5).numpy()
        weight = model.linear_heads()[task][0].double().numpy()
        heads[task] = weight - weight.mean(0)
    found = dict.fromkeys(experts, 0.0)
    nothing = dict.fromkeys(experts, 0.0)
    for fold in range(5):
        left, right = np.zeros((8, 8)), np.zeros((8, 8))
        for task, (zm, zi) in features.items():
            kept = folds[task] != fold
            left += zi[kept].T @ zm[kept] + 0.5 * np.eye(8)
            right += zm[kept].T @ zm[kept] + 0.5 * np.eye(8)
        w = left @ np.linalg.inv(right)
        for task, (zm, zi) in features.items():
            out = folds[task] == fold
            found[task] += np.square((zm[out] @ w.T - zi[out]) @ heads[task].T).sum()
            nothing[task] += np.square((zm[out] - zi[out]) @ heads[task].T).sum()
    for task, (_, zi) in features.items():
        read = zi @ heads[task].T
        variance = np.square(read - read.mean(0)).sum()
        assert errors[task].corrected == pytest.approx(found[task] / variance, rel=1e-4)
        assert errors[task].identity == pytest.approx(nothing[task] / variance, rel=1e-4)


def test_the_best_is_kept_and_everything_is_recorded(setting, tmp_path):
    base, head, experts, inputs = setting
    methods = [TaskArithmetic(scale=s) for s in (0.0, 0.2, 0.4)]
    options = [FIXED, replace(FIXED, beta=5.0), replace(FIXED, metric="head")]
    selection = select_merge(experts, methods, inputs, corrections=options, base=base, head=head)
    errors = [row["error"] for row in selection.table]
    assert len(errors) == 9
    assert errors == sorted(errors)
    assert selection.best.error == errors[0]
    assert selection.model.options == selection.best.correction
    again = merge_experts(
        experts,
        selection.best.method,
        inputs,
        base=base,
        head=head,
        correction=selection.best.correction,
    )
    assert score_merge(again, selection.best.method).error == pytest.approx(errors[0], rel=1e-6)
    selection.model.save(tmp_path / "merged")
    loaded = MergedModel.load(tmp_path / "merged", module=base)
    assert loaded.record["selection"] == json.loads(json.dumps(selection.table))
    assert loaded.record["method"] == loaded.record["selection"][0]["method"]
    assert loaded.options == selection.best.correction
    assert brief(selection.best.method) in selection.summary(1)


def test_the_base_is_found_where_experts_cancel():
    """Experts whose average is nearly nothing, each a rotation of the base's features.

    Their heads read different directions, so one map of the base's features serves both.
    """
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    for parameter in base.parameters():
        nn.init.normal_(parameter)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    experts = {}
    for task, sign in (("a", 1.0), ("b", -1.0)):
        expert = copy.deepcopy(base)
        layer = expert[2]
        with torch.no_grad():
            layer.weight.copy_(sign * rotation @ layer.weight + 0.01)
            layer.bias.copy_(sign * rotation @ layer.bias)
        expert[3] = nn.Linear(8, 3)
        experts[task] = expert
    inputs = {task: 3 * torch.randn(200, 6) for task in experts}
    selection = select_merge(experts, None, inputs, corrections=[HEAD], base=base, head="3")
    assert selection.best.method == TaskArithmetic(scale=0.0)
    assert selection.best.error < 1e-3
    average = next(c.error for c in selection.candidates if c.method == Average())
    assert average > 0.1


def test_the_first_of_equals_is_kept(setting):
    base, head, experts, inputs = setting
    methods = [TaskArithmetic(scale=1 / 3), TaskArithmetic(scale=1 / 3, otherwise="base")]
    selection = select_merge(
        experts, methods, inputs, corrections=[FIXED, FIXED], base=base, head=head
    )
    assert [c.method for c in selection.candidates] == [methods[0]] * 2 + [methods[1]] * 2


def test_the_report_is_made_once_and_tells_of_the_best(setting, monkeypatch):
    base, head, experts, inputs = setting
    counted = []
    monkeypatch.setattr(
        "lightning_merge.selecting.measure", lambda *a: counted.append(1) or measure(*a)
    )
    monkeypatch.setattr("lightning_merge.merging.measure", lambda *a: pytest.fail("again"))
    kept = Average(exclude=("net.0.*",), otherwise="base")
    found = select_merge(experts, [kept, kept], inputs, corrections=[FIXED], base=base, head=head)
    assert len(counted) == 1
    assert found.model.report["fallback"]["base"]["names"] == ["net.0.weight", "net.0.bias"]


def test_only_tasks_with_preference_count(setting):
    base, head, experts, inputs = setting
    selection = select_merge(
        experts,
        [Average()],
        inputs,
        corrections=[FIXED],
        preference={"a": 1.0, "c": 2.0},
        base=base,
        head=head,
    )
    assert set(selection.best.errors) == {"a", "c"}


def test_experts_that_need_no_correction_warn():
    base = MLP()
    experts = {task: copy.deepcopy(base) for task in "ab"}
    inputs = {task: torch.randn(20, 6) for task in experts}
    with (
        pytest.warns(UserWarning, match=r"not improved by any correction.*uncorrected\(\)"),
        pytest.warns(UserWarning, match="no expert differs from the base"),
    ):
        select_merge(experts, [Average()], inputs, corrections=[FIXED], base=base, head="net.9")


def test_bad_input(setting):
    base, head, experts, inputs = setting
    with pytest.raises(ValueError, match="0 methods and 3 corrections"):
        select_merge(experts, [], inputs, base=base, head=head)
    one = {task: x[:1] for task, x in inputs.items()}
    with pytest.raises(ValueError, match="at least two with samples"):
        select_merge(experts, [Average()], one, corrections=[FIXED], base=base, head=head)
    with pytest.raises(ValueError, match="switched off"):
        corrections_with(None)


def test_what_is_tried():
    methods = default_candidates(8)
    assert TaskArithmetic(scale=0.0) in methods
    assert Average() in methods
    assert all(m.scale <= 1 for m in default_candidates(2) if isinstance(m, TaskArithmetic))
    assert select_from([Average()], TaskArithmetic(), 8) == [Average()]
    assert select_from(True, Average(), 8) == methods
    assert select_from(True, TaskArithmetic(scale=0.77), 8)[0] == TaskArithmetic(scale=0.77)
    assert corrections_with("paper")[0] == CorrectionOptions.paper()
    assert corrections_with(CorrectionOptions()) == list(CORRECTIONS)


def test_a_trainer_selects(setting, tmp_path):
    base, head, experts, inputs = setting
    pool = ExpertPool.create(
        tmp_path / "pool", base, head, model={"class_path": "tests.networks.MLP", "init_args": {}}
    )
    for task, expert in experts.items():
        pool.add(task, expert, calibration=inputs[task])
    trainer = MergeTrainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    output = str(tmp_path / "merged")
    trainer.merge(pool=str(pool.path), output=output, select=[Average(), TaskArithmetic(scale=0.0)])
    model = MergedModel.load(output)
    assert len(model.record["selection"]) == 2 * len(CORRECTIONS)
    assert isinstance(model.with_preference({"a": 1.0}, "a"), nn.Module)
