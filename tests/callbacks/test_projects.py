"""Projects of other people, in their shapes, in config form and on the command line."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_merge import ExpertPool, MergedModel, merge_experts
from lightning_merge.callbacks import MergeCallback
from lightning_merge.networks import call_network
from tests.callbacks import shapes
from tests.callbacks.test_merge import fit as fit_alone

SHAPES = {
    "XRay": ("fc", None, "Tables", {"x": (3, 6)}),
    "OneSequential": ("net.4", None, "Tables", {"x": (3, 6)}),
    "CompiledInSetup": ("fc", None, "Tables", {"x": (3, 6)}),
    "LiveHyperparameters": ("fc", None, "Tables", {"x": (3, 6)}),
    "Records": ("fc", None, "RecordTables", {"x": (3, 6)}),
    "Text": ("classifier", "model", "Sentences", {"input_ids": (3, 5), "attention_mask": (3, 5)}),
}
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
    "default_root_dir": "logs",
}
BEST = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"monitor": "val_loss", "dirpath": "checkpoints", "save_top_k": 1},
}


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(tmp_path)


def experiment(shape, data, *callbacks):
    config = {
        "model": {"class_path": f"tests.callbacks.shapes.{shape}"},
        "data": {"class_path": f"tests.callbacks.shapes.{data}"},
        "trainer": {**QUIET, "callbacks": [BEST, *callbacks]},
    }
    Path("exp.yaml").write_text(yaml.safe_dump(config))


def project(*args, **options):
    LightningCLI(args=list(args), save_config_callback=None, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_forms_record_two_experts_that_merge(shape, request):
    head, network, data, inputs = SHAPES[shape]
    experiment(shape, data)
    preset = request.config.rootpath / "callbacks" / "presets" / "merge.yaml"
    own = [f"--trainer.callbacks.head={head}", "--trainer.callbacks.tasks=[one, two]"]
    own += [f"--trainer.callbacks.network={network}"] if network else []
    add = "--trainer.callbacks+=lightning_merge.callbacks.MergeCallback"
    forms = [("-c", str(preset)), (add, "--trainer.callbacks.pool=runs/pool")]
    for seed, (task, form) in enumerate(zip(("one", "two"), forms, strict=True)):
        words = ("fit", "-c", "exp.yaml", f"--data.seed={seed}", *form)
        project(*words, *own, f"--trainer.callbacks.task={task}")
    pool = ExpertPool.open("runs/pool")
    assert pool.tasks == ["one", "two"]
    assert len(pool.calibration("one")) == 40
    assert "val_loss" in pool.scores("one")
    module = getattr(shapes, shape)()
    model = MergedModel.load("runs/merged", module=module.model if network else module)
    kind = torch.randint(1, 3, (3, 5)) if network else torch.randn(3, 6)
    batch = dict.fromkeys(inputs, kind) if network else kind
    tailored = model.with_preference({"one": 0.7, "two": 0.3}, "one")
    found = call_network(tailored, batch)
    assert (found["logits"] if network else found).shape[0] == 3
    assert set(tailored.state_dict()) == set((module.model if network else module).state_dict())


def test_finetuning_and_averaging_callbacks_stand_beside_ours():
    ema = {
        "class_path": "lightning.pytorch.callbacks.EMAWeightAveraging",
        "init_args": {"decay": 0.5},
    }
    for seed, task in enumerate(("one", "two")):
        beside = {"class_path": "tests.callbacks.shapes.Unfreeze"} if seed else ema
        experiment("XRay", "Tables", beside)
        project(
            *("fit", "-c", "exp.yaml", "--trainer.max_epochs=3", f"--data.seed={seed}"),
            "--trainer.callbacks+=lightning_merge.callbacks.MergeCallback",
            *("--trainer.callbacks.pool=pool", "--trainer.callbacks.head=fc"),
            *(f"--trainer.callbacks.task={task}", "--trainer.callbacks.weights=last"),
        )
    pool, start = ExpertPool.open("pool"), shapes.XRay()
    name = "feature_extractor.0.weight"
    for task in pool.tasks:  # the first epoch of the second trains the head alone, the next both
        assert not torch.equal(pool.expert(task)[name], start.state_dict()[name]), task
    assert merge_experts(pool, module=start).tasks == ["one", "two"]


def test_hooks_of_the_datamodule_scale_calibration_and_test_inputs(tmp_path):
    ours = MergeCallback(str(tmp_path / "pool"), "one", "fc", calibration="val")
    fit_alone(tmp_path, ours, module=shapes.XRay(), data=shapes.Scaling())
    found = ExpertPool.open("pool").calibration("one").tensors()["inputs"]
    expected = torch.cat([x for x, _ in shapes.Scaling().val_dataloader()]).float() / 100
    assert torch.equal(found, expected)


def test_hooks_of_the_module_run_as_in_a_validation(tmp_path):
    ours = MergeCallback(str(tmp_path / "pool"), "one", "fc", calibration="train")
    _, module = fit_alone(tmp_path, ours, module=shapes.Augmenting(), data=shapes.Tables())
    found = ExpertPool.open("pool").calibration("one").tensors()["inputs"]
    x = shapes.samples(0, 40)[0]
    torch.testing.assert_close(found, 2 * x + 1)
    assert module.training


def test_a_fit_from_a_random_initialisation_is_told_so(tmp_path):
    fit_alone(
        tmp_path, MergeCallback("pool", "one", "fc"), module=shapes.XRay(), data=shapes.Tables()
    )
    other = shapes.XRay()
    other.feature_extractor = shapes.Extractor()
    with pytest.raises(ValueError, match=r"as two random initialisations are.*base\.safetensors"):
        fit_alone(tmp_path, MergeCallback("pool", "two", "fc"), module=other, data=shapes.Tables())
    nudged = shapes.XRay()
    with torch.no_grad():
        nudged.feature_extractor[0].weight += 0.01
    with pytest.raises(ValueError, match="as a network is that was trained further"):
        fit_alone(tmp_path, MergeCallback("pool", "two", "fc"), module=nudged, data=shapes.Tables())


# Hydra --------------------------------------------------------------------------------------------

HYDRA = """
callbacks:
  merge:
    _target_: lightning_merge.callbacks.MergeCallback
    pool: {pool}
    task: one
    head: fc
    tasks: [one, two]
    inputs: [x]
    method: {{_target_: lightning_merge.methods.TIES, density: 0.3}}
    correction: {correction}
    model: {{class_path: tests.callbacks.shapes.XRay, init_args: {{lr: 0.1}}}}
"""
OPTIONS = ("{_target_: lightning_merge.correction.CorrectionOptions, beta: 0.2}", "{beta: 0.2}")


@pytest.mark.parametrize("recursive", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_hydra_builds_the_callback(tmp_path, recursive, options):
    hydra = pytest.importorskip("hydra.utils")
    omegaconf = pytest.importorskip("omegaconf")
    text = HYDRA.format(pool=tmp_path / "pool", correction=options)
    config = omegaconf.OmegaConf.create(yaml.safe_load(text)).callbacks.merge
    ours = hydra.instantiate(config, _recursive_=recursive)
    assert (ours.tasks, ours.inputs, ours.method.density) == (["one", "two"], ["x"], 0.3)
    assert ours.correction.beta == 0.2
    fit_alone(tmp_path, ours, module=shapes.XRay(), data=shapes.Tables())
    assert ExpertPool.open("pool").model["init_args"] == {"lr": 0.1}


def test_the_hydra_preset_composes(tmp_path, request):
    hydra = pytest.importorskip("hydra")
    presets = request.config.rootpath / "callbacks" / "presets"
    (tmp_path / "conf" / "callbacks").mkdir(parents=True)
    (tmp_path / "conf" / "callbacks" / "merge.yaml").write_text(
        (presets / "hydra.yaml").read_text()
    )
    (tmp_path / "conf" / "train.yaml").write_text("defaults: [{callbacks: merge}]\n")
    with hydra.initialize_config_dir(str(tmp_path / "conf"), version_base=None):
        words = ["callbacks.merge.task=one", "callbacks.merge.head=fc"]
        config = hydra.compose("train", overrides=words)
    from hydra.utils import instantiate

    assert instantiate(config.callbacks.merge).task == "one"


def test_a_network_that_hydra_built_is_refused():
    with pytest.raises(ValueError, match="a XRay came: Hydra builds every '_target_'"):
        MergeCallback("pool", model=shapes.XRay())
    with pytest.raises(ValueError, match=r"'torch\.nn\.Linear' is no CorrectionOptions"):
        MergeCallback("pool", correction={"_target_": "torch.nn.Linear"})


# pytorch_lightning --------------------------------------------------------------------------------

TWIN = """
import torch, pytorch_lightning as pl
from pytorch_lightning.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

class Module(pl.LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fc = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)
    def forward(self, x):
        return self.fc(torch.relu(self.body(x)))
    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(20, 6), torch.arange(20) % 3), 5)
    val_dataloader = train_dataloader

if __name__ == "__main__":
    LightningCLI(Module, Data, save_config_callback=None)
"""


@pytest.mark.slow
def test_pytorch_lightning_projects_take_the_twin(tmp_path, monkeypatch, request):
    pl = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.cli import LightningCLI as TwinCLI

    names = {"__name__": "train"}
    exec(TWIN, names)
    preset = request.config.rootpath / "callbacks" / "presets" / "pytorch_lightning.yaml"
    best = "pytorch_lightning.callbacks.ModelCheckpoint"
    callbacks = [{"class_path": best, "init_args": {"monitor": "val_loss"}}]
    Path("exp.yaml").write_text(yaml.safe_dump({"trainer": {**QUIET, "callbacks": callbacks}}))
    for task in ("one", "two"):
        TwinCLI(
            names["Module"],
            names["Data"],
            save_config_callback=None,
            args=[
                *("fit", "-c", "exp.yaml", "-c", str(preset)),
                *(f"--trainer.callbacks.task={task}", "--trainer.callbacks.head=fc"),
                *("--trainer.callbacks.tasks=[one, two]", "--trainer.callbacks.weights=best"),
            ],
        )
    assert ExpertPool.open("runs/pool").scores("one").keys() >= {"val_loss"}
    assert MergedModel.load("runs/merged", module=names["Module"]()).tasks == ["one", "two"]
    # a plain Trainer of the twin takes either class
    ours = MergeCallback("other", "one", "fc", weights="best")
    keep = pl.callbacks.ModelCheckpoint("kept", monitor="val_loss")
    options = {**QUIET, "callbacks": [ours, keep]}
    pl.Trainer(**options).fit(names["Module"](), names["Data"]())
    assert ExpertPool.open("other").tasks == ["one"]


def test_the_twin_without_pytorch_lightning_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.delitem(sys.modules, "lightning_merge.callbacks.pl", raising=False)
    with pytest.raises(ModuleNotFoundError, match="serves projects on pytorch_lightning"):
        import lightning_merge.callbacks.pl  # noqa: F401
