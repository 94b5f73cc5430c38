"""Heads and metrics of any kind, end to end: fit with the callback, merge, sweep."""

import copy
import json
import sys
from functools import partial

import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError, R2Score
from torchmetrics.classification import BinaryAUROC, MulticlassF1Score, MultilabelF1Score

from lightning_merge import ExpertPool, MergedModel, merge_experts
from lightning_merge.callbacks import MergeCallback
from lightning_merge.cli import main
from lightning_merge.sweeping import PreferenceGrid
from lightning_merge.testing import Client, path_of_network
from lightning_merge.trainer import MergeTrainer
from tests.callbacks.project import Classifier, WithTeacher, samples
from tests.callbacks.shapes import CompiledInSetup, OneSequential, Tables, XRay
from tests.networks import tuned

GRID = PreferenceGrid(pairwise=3, response=0, lattice=0)
HEADS = {
    "sick": (1, BinaryAUROC, lambda x: (x[:, 0] > 0).long(), nn.BCEWithLogitsLoss()),
    "kind": (5, partial(MulticlassF1Score, 5), lambda x: x[:, :5].argmax(1), nn.CrossEntropyLoss()),
    "tags": (
        3,
        partial(MultilabelF1Score, 3),
        lambda x: (x[:, 1:4] > 0).long(),
        nn.BCEWithLogitsLoss(),
    ),
    "size": (1, R2Score, lambda x: x[:, 4] - x[:, 5], nn.MSELoss()),
    "pose": (2, R2Score, lambda x: x[:, :2] * 2, nn.MSELoss()),
}


class Anything(Classifier):
    """A base with the head and the loss of a task."""

    def __init__(self, outputs, loss):
        super().__init__()
        self.model.net[9] = nn.Linear(8, outputs)
        self.loss = loss

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self(x)
        scores = scores.squeeze(1) if scores.shape[1] == 1 else scores
        return self.loss(scores, y if isinstance(self.loss, nn.CrossEntropyLoss) else y.float())

    validation_step = test_step = None


class Tasks(LightningDataModule):
    def __init__(self, task=None):
        super().__init__()
        self.task = task

    def data(self, task, seed, count=64):
        x, _ = samples(seed, count)
        return TensorDataset(x, HEADS[task][2](x))

    def train_dataloader(self):
        return DataLoader(self.data(self.task, 1), 16, shuffle=True)

    def test_dataset(self, task):
        return self.data(task, 2)

    def dataloader(self, dataset):
        return DataLoader(dataset, 24)

    def test_metric(self, task):
        return HEADS[task][1]()


def quiet(kind=Trainer, **options):
    options = {"logger": False, "enable_checkpointing": False} | options
    return kind(
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Five experts with heads of five kinds, fitted by the callback, the last of which merges."""
    folder = tmp_path_factory.mktemp("heads")
    torch.manual_seed(0)
    for task, (outputs, _, _, loss) in HEADS.items():
        ours = MergeCallback(
            str(folder / "pool"),
            head="net.9",
            network="model",
            tasks=list(HEADS),
            calibration="train",
            model={"class_path": "tests.callbacks.project.Net", "init_args": {}},
        )
        quiet(callbacks=[ours], max_epochs=1).fit(Anything(outputs, loss), Tasks(task))
    return folder / "merged"


def test_every_kind_of_head_is_swept_by_its_own_metric(merged, tmp_path):
    out = tmp_path / "sweep"
    trainer = quiet(MergeTrainer)
    trainer.sweep(datamodule=Tasks(), merged=str(merged), output=str(out), grid=GRID)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["metric"] == "BinaryAUROC, MulticlassF1Score, MultilabelF1Score, R2Score"
    assert (summary["higher_is_better"], summary["normalization"]) == (True, "value / expert")
    model, table = MergedModel.load(merged), pd.read_parquet(out / "results.parquet")
    equal = model.with_preference(dict.fromkeys(HEADS, 1.0)).eval()
    for task, (outputs, make, _, _) in HEADS.items():
        x, y = Tasks().test_dataset(task).tensors
        expected = make()
        answers = equal(x, task)
        expected.update(answers.squeeze(1) if outputs == 1 else answers, y)
        assert table[f"raw/{task}"][0] == pytest.approx(float(expected.compute()), abs=1e-6), task
    assert "this sweep measured" not in (out / "report.html").read_text()


def test_errors_are_better_when_they_are_smaller(merged, tmp_path):
    model = MergedModel.load(merged)
    for task in ("sick", "kind", "tags"):
        model.drop_task(task)
    model.save(tmp_path / "two")
    metrics = {"size": MeanSquaredError(), "pose": MeanSquaredError()}
    out = tmp_path / "sweep"
    trainer = quiet(MergeTrainer)
    trainer.sweep(
        datamodule=Tasks(),
        merged=str(tmp_path / "two"),
        output=str(out),
        grid=GRID,
        metrics=metrics,
    )
    summary = json.loads((out / "summary.json").read_text())
    rows = summary["rows"]
    assert (summary["higher_is_better"], summary["normalization"]) == (False, "expert / value")
    for name in ("base", "equal"):
        share = rows["experts"]["raw"]["pose"] / rows[name]["raw"]["pose"]
        assert rows[name]["normalized"]["pose"] == pytest.approx(share)
    page = (out / "report.html").read_text()
    assert "MeanSquaredError (lower is better)" in page
    with pytest.raises(ValueError, match="a sweep has no direction"):
        trainer.sweep(
            datamodule=Tasks(),
            merged=str(merged),
            output=str(out),
            metrics={"size": MeanSquaredError()},
        )


def test_accuracy_of_one_logit_is_refused_with_the_way_out(merged, tmp_path):
    class Undeclared(Tasks):
        test_metric = None

        def __getattribute__(self, name):
            if name == "test_metric":
                raise AttributeError(name)
            return super().__getattribute__(name)

    with pytest.raises(ValueError, match=r"found \(.*1\)\. For one binary logit.*--via test_step"):
        quiet(MergeTrainer).sweep(
            datamodule=Undeclared(), merged=str(merged), output=str(tmp_path / "out")
        )


# through the project's own test_step --------------------------------------------------------------


def xray_pool(folder, base, head):
    pool = ExpertPool.create(folder / "pool", base, head)
    for seed, task in enumerate(("lung", "bone")):
        pool.add(task, tuned(base, seed), calibration=samples(seed, 40)[0])
    merge_experts(pool, module=base).save(folder / "merged")
    return pool


SHAPES = {"string backbone": (XRay, "fc"), "one net": (OneSequential, "net.4")}


@pytest.mark.parametrize("name", SHAPES)
def test_the_projects_own_test_step_judges(tmp_path, name):
    kind, head = SHAPES[name]
    pool = xray_pool(tmp_path, kind(), head)
    clients = {"lung": Client(data=Tables(1)), "bone": Client(model=kind(), data=Tables(2))}
    trainer = quiet(MergeTrainer)
    trainer.sweep(
        kind(),
        merged=str(tmp_path / "merged"),
        output=str(tmp_path / "sweep"),
        grid=GRID,
        via="test_step",
        metric="test_auroc",
        mode="max",
        clients=clients,
    )
    table = pd.read_parquet(tmp_path / "sweep" / "results.parquet")
    summary = json.loads((tmp_path / "sweep" / "summary.json").read_text())
    model = MergedModel.load(tmp_path / "merged", module=kind())
    assert summary["metric"] == "test_auroc"
    for task, client in clients.items():
        for row, network in (
            (0, model.with_preference({"lung": 1.0, "bone": 1.0}, task)),
            (len(table) - 1, None),
        ):
            weights = {t: table[f"preference/{t}"][row] for t in clients}
            network = network or model.with_preference(weights, task)
            (found,) = quiet().test(copy.deepcopy(network), client.data, verbose=False)
            assert table[f"raw/{task}"][row] == pytest.approx(found["test_auroc"])
        expert = kind()
        expert.load_state_dict(
            {**pool.expert(task), **{f"{head}.{k}": v for k, v in pool.head_state(task).items()}}
        )
        (found,) = quiet().test(expert, client.data, verbose=False)
        assert summary["rows"]["experts"]["raw"][task] == pytest.approx(found["test_auroc"])


def test_a_module_compiled_in_setup_is_filled(tmp_path):
    xray_pool(tmp_path, XRay(), "fc")
    clients = {task: Client(data=Tables(i)) for i, task in enumerate(("lung", "bone"))}
    results = []
    for kind in (XRay, CompiledInSetup):
        quiet(MergeTrainer).sweep(
            kind(),
            merged=str(tmp_path / "merged"),
            output=str(tmp_path / kind.__name__),
            grid=PreferenceGrid(pairwise=0, response=0, lattice=0),
            via="test_step",
            metric="test_loss",
            mode="min",
            clients=clients,
        )
        results.append(pd.read_parquet(tmp_path / kind.__name__ / "results.parquet"))
    pd.testing.assert_frame_equal(*results)


def test_mistakes_of_a_sweep_through_test_steps(tmp_path):
    xray_pool(tmp_path, XRay(), "fc")
    options = {"merged": str(tmp_path / "merged"), "output": str(tmp_path / "out"), "grid": GRID}
    own = {task: Client(data=Tables()) for task in ("lung", "bone")}
    logged = {"via": "test_step", "metric": "test_auroc", "mode": "max"}
    trainer = quiet(MergeTrainer)
    for changes, message in (
        ({**logged, "metric": "f1"}, "does not log 'f1'; it logs test_auroc, test_loss"),
        ({**logged, "metric": None}, "needs the name of a logged metric for 'bone'"),
        ({**logged, "mode": None}, "give --metric NAME and --mode"),
        ({**logged, "clients": {}}, "does not know the test set of 'bone'"),
        ({**logged, "clients": {"x": Client()}}, r"clients of unknown tasks \['x'\]"),
        ({"metric": "test_auroc"}, "are for --via test_step"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.sweep(XRay(), **{"clients": own, **options, **changes})
    assert not (tmp_path / "out").exists()


def test_the_network_is_found_once_or_not_at_all():
    names = {"net.0.weight", "net.2.weight"}
    assert path_of_network(Classifier(), names, "net.9") == "model"
    with pytest.raises(ValueError, match=r"several parts \(model, ema\).*--network"):
        path_of_network(WithTeacher(), names, "net.9")
    with pytest.raises(ValueError, match="no part of Linear"):
        path_of_network(nn.Linear(2, 2), names, "net.9")


CONFIG = """
model: {class_path: tests.callbacks.shapes.XRay}
trainer: {accelerator: cpu, devices: 1, enable_progress_bar: false, logger: false,
          enable_checkpointing: false, enable_model_summary: false}
sweep:
  merged: merged
  output: sweep
  via: test_step
  metric: test_loss
  mode: min
  grid: {pairwise: 0, response: 0, lattice: 0}
  clients:
    lung: {data: {class_path: tests.callbacks.shapes.Tables, init_args: {seed: 1}}}
    bone: {data: {class_path: tests.callbacks.shapes.Tables, init_args: {seed: 2}}}
"""


def test_the_command_line_sweeps_via_test_step(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-merge"])
    monkeypatch.chdir(tmp_path)
    xray_pool(tmp_path, XRay(), "fc")
    (tmp_path / "suite.yaml").write_text(CONFIG)
    main(["sweep", "-c", "suite.yaml"])
    summary = json.loads((tmp_path / "sweep" / "summary.json").read_text())
    assert (summary["metric"], summary["higher_is_better"]) == ("test_loss", False)
    words = ["--metrics.kind=torchmetrics.classification.MulticlassF1Score"]
    with pytest.raises(SystemExit):
        main(["sweep", "-c", "suite.yaml", *words, "--metrics.kind.num_classes=5"])
