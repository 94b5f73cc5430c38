"""The commands and the code of the how-to pages."""

import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from lightning_merge import ExpertPool
from lightning_merge.cli import main
from lightning_merge.scoring import declared, direction
from tests.callbacks import shapes
from tests.callbacks.project import Net
from tests.networks import tuned

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "howto").glob("*.md"))
BLOCKS = [
    (page.stem, language, code)
    for page in PAGES
    for language, code in re.findall(r"```(\w+)\n(.*?)```", page.read_text("utf-8"), flags=re.S)
]
COMMANDS = [
    (page, line.strip())
    for page, language, code in BLOCKS
    if language == "sh"
    for line in code.replace("\\\n", " ").splitlines()
]


def code_of(page, language):
    return [code for name, kind, code in BLOCKS if (name, kind) == (page, language)]


@pytest.fixture(autouse=True)
def _project(monkeypatch, tmp_path):
    """A project as the pages call it."""
    mine = types.ModuleType("my_project")
    mine.MyModule, mine.BoneModule = shapes.XRay, shapes.XRay
    monkeypatch.setitem(sys.modules, "my_project", mine)
    monkeypatch.setattr(sys, "argv", ["lightning-merge"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "callbacks").symlink_to(ROOT / "callbacks")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "suite.yaml").write_text("model: my_project.MyModule\n")
    exp = {"model": "tests.callbacks.shapes.XRay", "data": "tests.callbacks.shapes.Tables"}
    (tmp_path / "exp.yaml").write_text(yaml.safe_dump(exp))


def test_there_are_pages_and_commands():
    assert {"plug_in", "import", "evaluate", "several_devices"} <= {page.stem for page in PAGES}
    assert len(COMMANDS) >= 8


def printed(capsys, run):
    with pytest.raises(SystemExit) as stop:
        run()
    out = capsys.readouterr()
    assert stop.value.code == 0, out.err
    return yaml.safe_load(out.out)


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_parse(page, command, capsys):
    program, *words = shlex.split(command, comments=True)
    if program == "make":
        suite = words[1].removeprefix("SUITE=")
        assert f"TASKS_{suite} " in (ROOT / "Makefile").read_text("utf-8")
    elif program == "pip":
        extra = re.fullmatch(r"lightning-merge\[(\w+)\]", words[1])
        assert extra is not None
        assert f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text("utf-8")
    elif program == "lightning-merge":
        found = printed(capsys, lambda: main([*words, "--print_config"]))
        assert "trainer" in found
    elif "pytorch_lightning" in command:
        cli = pytest.importorskip("pytorch_lightning.cli")
        pytest.skip(f"run by the tests of {cli.__name__} projects")
    elif words[1] == "fit":
        args = [*words[1:], "--print_config"]
        found = printed(capsys, lambda: LightningCLI(args=args, save_config_callback=None))
        last = found["trainer"]["callbacks"][-1]
        assert last["class_path"] == "lightning_merge.callbacks.MergeCallback"
        assert last["init_args"]["head"] == "fc"
    else:
        assert all(word.startswith("callbacks.merge.") for word in words[1:])


def test_the_script_records_an_expert():
    module, loader = shapes.XRay(), shapes.Tables().train_dataloader()

    def quiet(**options):
        return Trainer(**options, accelerator="cpu", logger=False, enable_progress_bar=False)

    exec(code_of("plug_in", "python")[0], {"module": module, "loader": loader, "Trainer": quiet})
    assert ExpertPool.open("pool").tasks == ["digits"]


def test_the_import_from_python():
    base = shapes.XRay()
    torch.save(tuned(base, 1).state_dict(), "digits.pt")
    names = {"base": base, "checkpoint": "digits.pt", "inputs": torch.randn(5, 6)}
    exec(code_of("import", "python")[0], names)
    assert len(ExpertPool.open("pool").calibration("digits")) == 5
    assert Net is not None


def test_the_method_of_the_page_goes_half_the_way():
    names: dict = {"__name__": "halfway"}
    exec(code_of("add_method", "python")[0], names)
    base, experts = {"w": torch.zeros(3)}, {t: {"w": torch.full((3,), t + 1.0)} for t in (0, 2)}
    merged = names["Halfway"](share=0.25).merge(base, {str(t): e for t, e in experts.items()})
    torch.testing.assert_close(merged["w"], torch.full((3,), 0.5))


def test_the_metrics_of_the_page_are_built_and_agree():
    from jsonargparse import ArgumentParser
    from torchmetrics import Metric

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--metrics", type=dict[str, Metric])
    text = yaml.safe_load(code_of("evaluate", "yaml")[0])["sweep"]
    metrics = parser.instantiate_classes(parser.parse_object(text)).metrics
    assert direction(declared(object(), list(metrics), metrics))
