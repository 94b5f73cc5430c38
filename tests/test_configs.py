"""Every YAML in configs/ is what the command line takes, and trains in small."""

from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_merge.data import GlyphTask, TaskSuite
from lightning_merge.modules import ExpertModule

CONFIGS = Path(__file__).parent.parent / "configs"


def load(name, **model):
    """The model and data of a config, as LightningCLI makes them."""
    config = yaml.safe_load((CONFIGS / name).read_text())
    config["model"]["init_args"] |= model
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    made = parser.instantiate(parser.parse_object({k: config[k] for k in ("model", "data")}))
    return made.model, made.data, config


def test_the_configs_are_found():
    names = {path.name for path in CONFIGS.glob("*.yaml")}
    assert {"glyphs.yaml", "glyphs_base.yaml", "real.yaml"} <= names


@pytest.mark.parametrize("name", ["glyphs.yaml", "glyphs_base.yaml", "real.yaml"])
def test_model_and_data_can_be_made(name):
    module, suite, config = load(name, **({} if "base" in name else {"base_checkpoint": None}))
    assert isinstance(module, ExpertModule)
    assert isinstance(suite, TaskSuite)
    assert "trainer" in config
    base = load("glyphs_base.yaml")[2]["model"]["init_args"]
    assert config["model"]["init_args"]["model_args"] == base["model_args"]


def test_experts_start_from_the_checkpoint_that_the_base_config_writes():
    keep = load("glyphs_base.yaml")[2]["trainer"]["callbacks"][0]["init_args"]
    for name in ("glyphs.yaml", "real.yaml"):
        config = load(name, base_checkpoint=None)[2]
        assert config["model"]["init_args"]["base_checkpoint"] is None
        text = yaml.safe_load((CONFIGS / name).read_text())
        want = f"{keep['dirpath']}/{keep['filename']}.ckpt"
        assert text["model"]["init_args"]["base_checkpoint"] == want


def test_an_expert_starts_from_the_base(tmp_path):
    base, _, _ = load("glyphs_base.yaml")
    torch.save({"state_dict": base.state_dict()}, tmp_path / "base.ckpt")
    module, suite, _ = load("glyphs.yaml", base_checkpoint=str(tmp_path / "base.ckpt"))
    small = TaskSuite(
        {
            name: GlyphTask(task.script, train_size=16, val_size=16)
            for name, task in suite.tasks.items()
        },
        "greek",
    )
    assert list(small.tasks)[:3] == ["latin", "greek", "cyrillic"]
    backbone = base.network.state_dict()
    assert all(torch.equal(v, backbone[k]) for k, v in module.network.state_dict().items())
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, small)
    assert module.network.head.fc.out_features == 16
