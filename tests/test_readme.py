"""The README's code is run, and its commands are parsed."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_merge import MergedModel
from tests.networks import MLP, Scaled, tuned

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


class Net(Scaled):
    def forward(self, x):
        return super().forward(x)["logits"]


class Project(LightningModule):
    """A user's module that knows nothing of merging: backbone and head in one ``net``."""

    def __init__(self):
        super().__init__()
        self.net = MLP().net

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def python_blocks():
    return [code for language, code in BLOCKS if language == "python"]


def test_merging_from_python():
    base = Net()
    names = {
        "base": base,
        "experts": {task: tuned(base, seed) for seed, task in enumerate(("cars", "digits"))},
        "calibration": {task: torch.randn(20, 6) for task in ("cars", "digits")},
        "images": torch.randn(4, 6),
    }
    exec(python_blocks()[0], names)
    assert names["scores"].shape == (4, 3)


def test_merging_from_an_existing_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = TensorDataset(torch.randn(20, 6), torch.randint(3, (20,)))
    loader = DataLoader(data, batch_size=5)
    torch.manual_seed(1)
    state = Project().state_dict()

    def quiet(**options):
        return Trainer(**options, accelerator="cpu", logger=False, enable_progress_bar=False)

    for task in ("cars", "digits"):
        module = Project()
        module.load_state_dict(state)
        code = python_blocks()[1].replace('"digits", head', f'"{task}", head')
        exec(code, {"module": module, "loader": loader, "Trainer": quiet})
    model = MergedModel.load("merged", module=Project())
    assert model.tasks == ["digits", "cars"]
    assert model.with_preference({"cars": 1.0})(torch.randn(2, 6), "cars").shape == (2, 3)


COMMANDS = [
    line.split("#")[0].strip()
    for language, code in BLOCKS
    if language == "sh"
    for line in code.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("lightning-merge")])
def test_commands_parse(command, monkeypatch, capsys):
    from lightning_merge.cli import main

    monkeypatch.chdir(ROOT)
    words = [word.replace("runs/glyphs/base/base.ckpt", "x") for word in shlex.split(command)[1:]]
    monkeypatch.setattr("sys.argv", ["lightning-merge"])
    with pytest.raises(SystemExit) as stop:
        main([*words, "--print_config"])
    assert stop.value.code == 0
    assert "trainer:" in capsys.readouterr().out


def test_every_path_in_the_file_tree_exists():
    tree = next(code for language, code in re.findall(r"```(\w*)\n(.*?)```", README, flags=re.S)
                if language == "")  # fmt: skip
    folder = ROOT
    for line in tree.splitlines():
        names = [word for word in line.split("  ")[0 if line[0] != " " else 1].split() if word]
        if line.startswith("lightning_merge/"):
            folder = ROOT / "lightning_merge"
            continue
        parent = folder if line.startswith("  ") else ROOT
        for name in names:
            assert (parent / name).exists(), f"{name} in the README's tree does not exist"
    assert "make demo" in COMMANDS
    assert "make test" in COMMANDS
