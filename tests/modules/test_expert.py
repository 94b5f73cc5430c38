import json
import warnings

import pytest
import timm
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassF1Score

from lightning_merge.data import GlyphTask, TaskSuite
from lightning_merge.modules import ExpertModule, OneCycle

TINY = {
    "in_chans": 1,
    "depths": [1, 1, 1, 1],
    "dims": [8, 8, 16, 16],
    "patch_size": 2,
    "kernel_sizes": 3,
    "conv_mlp": False,
}


class MLP(nn.Module):
    """A network whose head is a number inside one Sequential."""

    def __init__(self, width: int = 12, classes: int = 5):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(1024, width), nn.ReLU(), nn.Linear(width, classes)
        )

    def forward(self, x):
        return self.net(x)


def suite(task="greek", strength=1.0, **options):
    sizes = {"train_size": 64, "val_size": 33, "test_size": 35, "calibration_size": 20}
    tasks = {name: GlyphTask(name, **sizes, strength=strength) for name in ("greek", "math")}
    return TaskSuite(tasks, task, batch_size=16, **options)


def trainer(path, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    settings = {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False}
    return Trainer(default_root_dir=path, **(quiet | settings | options))


def tiny(**options):
    return ExpertModule("convnext_atto", model_args=TINY, **options)


def test_a_fit_learns_and_logs_what_is_promised(tmp_path):
    seed_everything(0, verbose=False)
    module = tiny(
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01), lr_scheduler=OneCycle
    )
    data = suite(strength=0.1)
    run = trainer(tmp_path, max_epochs=15)
    run.fit(module, data)
    assert {"train/loss", "val/loss", "val/accuracy"} <= set(run.callback_metrics)
    result = run.test(module, data, verbose=False)[0]
    test = data.selected.test()
    module.eval()
    with torch.inference_mode():
        scores = module(torch.stack([x for x, _ in test]))
    labels = torch.stack([y for _, y in test])
    want = (scores.argmax(1) == labels).double().mean().item()
    assert result["test/accuracy"] == pytest.approx(want, abs=1e-6)
    want = nn.functional.cross_entropy(scores, labels).item()
    assert result["test/loss"] == pytest.approx(want, rel=1e-4)
    assert result["test/accuracy"] > 2 / 16


def test_predict_gives_scores_of_unlabeled_inputs(tmp_path):
    module, data = tiny(num_classes=16), suite()
    batches = trainer(tmp_path).predict(module, data)
    assert torch.cat(batches).shape == (20, 16)


def test_the_head_is_built_once_and_only_it_depends_on_the_task(tmp_path):
    seed_everything(0, verbose=False)
    module = tiny()
    backbone = {name: tensor.clone() for name, tensor in module.network.state_dict().items()}
    run = trainer(tmp_path, max_epochs=0)
    run.fit(module, suite())
    head = module.network.get_submodule(module.head)
    assert module.head == "head.fc"
    assert head.out_features == module.num_classes == 16
    trainer(tmp_path).validate(module, suite(), verbose=False)
    assert module.network.get_submodule(module.head) is head
    for name, tensor in backbone.items():
        assert torch.equal(module.network.state_dict()[name], tensor)


def test_heads_of_two_tasks_differ_under_one_seed_and_repeat(tmp_path):
    def head(task):
        seed_everything(0, verbose=False)
        module = tiny()
        trainer(tmp_path, max_epochs=0).fit(module, suite(task))
        return module.network.head.fc.weight

    assert torch.equal(head("greek"), head("greek"))
    assert not torch.equal(head("greek"), head("math"))


def test_resuming_restores_the_head_and_goes_on_where_it_stopped(tmp_path):
    def fit(epochs, resume=None):
        seed_everything(0, verbose=False)
        module = tiny(lr_scheduler=None)
        keep = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
        run = trainer(tmp_path, max_epochs=epochs, enable_checkpointing=True, callbacks=[keep])
        run.fit(module, suite(), ckpt_path=resume, weights_only=True)
        return module, run

    first, _ = fit(1)
    trained = first.network.head.fc.weight.clone()
    same, run = fit(1, tmp_path / "last.ckpt")
    assert torch.equal(same.network.head.fc.weight, trained)
    assert run.global_step == 4
    _, run = fit(2, tmp_path / "last.ckpt")
    assert run.global_step == 8


def test_the_schedule_spans_the_whole_fit(tmp_path):
    module = tiny(lr_scheduler=OneCycle)
    logger = CSVLogger(tmp_path)
    run = trainer(
        tmp_path, max_epochs=3, logger=logger, callbacks=[LearningRateMonitor("step")],
        log_every_n_steps=1,
    )  # fmt: skip
    run.fit(module, suite())
    rates = [row["lr-AdamW"] for row in logger.experiment.metrics if "lr-AdamW" in row]
    if not rates:
        lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
        column = lines[0].split(",").index("lr-AdamW")
        rates = [float(row.split(",")[column]) for row in lines[1:] if row.split(",")[column]]
    assert len(rates) == 12
    assert max(rates) == pytest.approx(1e-3, rel=0.1)
    assert rates[0] == pytest.approx(4e-5)
    assert rates[-1] == pytest.approx(4e-9, rel=1e-3)


def test_a_schedule_needs_an_end(tmp_path):
    module = tiny(lr_scheduler=OneCycle)
    with pytest.raises(ValueError, match="the schedule needs the number of steps"):
        trainer(tmp_path, max_epochs=-1).fit(module, suite())


def test_any_module_with_its_head_path(tmp_path):
    module = ExpertModule(network=MLP(), head="net.3")
    body = module.network.net[1]
    trainer(tmp_path).fit(module, suite())
    assert module.network.net[3].out_features == 16
    assert module.network.net[1] is body
    assert module.network_spec is None


def test_loss_and_metric_are_the_given_ones(tmp_path):
    module = tiny(
        loss=nn.CrossEntropyLoss(label_smoothing=0.5), metric=MulticlassF1Score, metric_name="f1"
    )
    data = suite()
    result = trainer(tmp_path).validate(module, data, verbose=False)[0]
    split = data.selected.validation()
    with torch.inference_mode():
        scores = module.eval()(torch.stack([x for x, _ in split]))
    labels = torch.stack([y for _, y in split])
    assert result["val/f1"] == pytest.approx(MulticlassF1Score(16)(scores, labels).item())
    want = nn.functional.cross_entropy(scores, labels, label_smoothing=0.5).item()
    assert result["val/loss"] == pytest.approx(want, rel=1e-4)


def test_the_base_checkpoint_gives_the_backbone_and_not_the_head(tmp_path):
    base = tiny(num_classes=7)
    torch.save({"state_dict": base.state_dict()}, tmp_path / "base.ckpt")
    torch.manual_seed(5)
    module = tiny(base_checkpoint=tmp_path / "base.ckpt", num_classes=7)
    for name, tensor in module.network.state_dict().items():
        same = torch.equal(tensor, base.network.state_dict()[name])
        assert same != (name == "head.fc.weight"), name


def test_the_spec_rebuilds_the_network_from_json(tmp_path):
    module = tiny(pretrained=False)
    trainer(tmp_path, max_epochs=0).fit(module, suite())
    spec = json.loads(json.dumps(module.network_spec))
    assert spec["class_path"] == "timm.create_model"
    again = timm.create_model(**spec["init_args"])
    again.load_state_dict(module.network.state_dict())
    assert spec["init_args"]["pretrained"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either 'model' .* or 'network' .*, found neither"),
        ({"model": "resnet18", "network": MLP()}, "found both"),
        ({"network": MLP()}, "give the 'head' of MLP: .* Its children are net"),
        ({"network": MLP(), "head": "net.9"}, "unknown path 'net.9'"),
        ({"network": MLP(), "head": "net.3", "pretrained": True}, "belong to timm models"),
        (
            {"model": "resnet18", "pretrained": True, "base_checkpoint": "x.ckpt"},
            "either 'pretrained' or 'base_checkpoint'",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExpertModule(**arguments)


def test_numbers_of_classes_that_are_unknown_or_differ(tmp_path):
    with pytest.raises(ValueError, match="the head has 3 classes, but TaskSuite has 16"):
        trainer(tmp_path).validate(tiny(num_classes=3), suite(), verbose=False)
    loader = DataLoader(suite().selected.test(), batch_size=8)
    with pytest.raises(ValueError, match="the number of classes is not known"):
        trainer(tmp_path).validate(tiny(), loader, verbose=False)
    trainer(tmp_path).validate(tiny(num_classes=16), loader, verbose=False)


def cli(path, network, *more):
    trainer_args = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.logger=false"]
    trainer_args += ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={path}"]
    task = {"class_path": "GlyphTask", "init_args": {"script": "math", "train_size": 32}}
    return LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        args=[
            "fit",
            "--model=ExpertModule",
            *network,
            "--data=TaskSuite",
            f"--data.tasks={json.dumps({'math': task})}",
            *trainer_args,
            *more,
        ],
    )


def test_everything_can_be_chosen_from_the_command_line(tmp_path):
    network = f'{{"class_path": "{__name__}.MLP", "init_args": {{"width": 6}}}}'
    run = cli(
        tmp_path,
        [f"--model.network={network}", "--model.head=net.3"],
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=0.25",
        "--model.lr_scheduler=WarmupCosine",
        "--model.lr_scheduler.floor=0.5",
        "--model.loss=torch.nn.CrossEntropyLoss",
        "--model.loss.label_smoothing=0.1",
        "--model.metric=torchmetrics.classification.MulticlassAccuracy",
        "--model.metric.average=macro",
        f"--trainer.callbacks+={{class_path: ModelCheckpoint, init_args: {{dirpath: {tmp_path}}}}}",
    )
    module = run.model
    optimizer = run.trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.125, rel=0.1)
    assert module.loss.label_smoothing == 0.1
    assert module.metrics["val_metric"].average == "macro"
    spec = json.loads(json.dumps(module.network_spec))
    assert spec == {"class_path": f"{__name__}.MLP", "init_args": {"width": 6, "classes": 5}}
    checkpoint = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)
    assert checkpoint["hyper_parameters"]["network"] == spec


def test_a_checkpoint_of_a_fit_in_python_needs_no_unpickling(tmp_path):
    keep = ModelCheckpoint(tmp_path, "last")
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=[keep])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*nn.Module.*")
        run.fit(ExpertModule(network=MLP(), head="net.3", loss=nn.CrossEntropyLoss()), suite())
    torch.load(tmp_path / "last.ckpt", weights_only=True)
