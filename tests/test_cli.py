import json
import re
import sys

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_merge import ExpertPool, MergedModel, merge_experts
from lightning_merge.cli import COMMANDS, main, restricted
from lightning_merge.methods import MaskedExperts
from tests.callbacks.project import Classifier, samples
from tests.networks import tuned

TASKS = ["one", "two", "three"]
STAGES = {"merge": "pool", "sweep": "merged", "compress": "pool", "export": "merged"}
QUIET = (
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.enable_progress_bar=false",
)


@pytest.fixture(autouse=True)
def _argv(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["lightning-merge"])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pool(tmp_path):
    base = Classifier().model
    model = {"class_path": "tests.callbacks.project.Net", "init_args": {}}
    pool = ExpertPool.create(tmp_path / "pool", base, "net.9", model=model)
    for seed, task in enumerate(TASKS):
        pool.add(task, tuned(base, seed), calibration=samples(seed, 30)[0])
    return pool


def run(capsys, *args):
    """Exit code and output of the command line."""
    code = 0
    try:
        main(list(args))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def merged(capsys, *args):
    code, out, err = run(capsys, "merge", *QUIET, "--pool=pool", "--output=merged", *args)
    assert code == 0, out + err
    return MergedModel.load("merged")


# help and printed configs -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_help_names_all_commands(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert out.startswith("usage: lightning-merge ")
    assert "steer the merged model with a preference" in out
    for command in COMMANDS:
        assert f"\n    {command} " in out


HEADINGS = {
    "merge": "Merge the experts of a pool and calibrate the correction:",
    "sweep": "Evaluate a merged model under every preference and write the report:",
    "compress": "Keep all experts of a pool in one small file, from which any of them is rebuilt:",
    "export": "Write the model tailored to one preference to a file that needs nothing of this",
}


@pytest.mark.parametrize("command", STAGES)
def test_the_help_of_a_stage_begins_with_its_own_options(command, capsys):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert out.startswith(f"usage: lightning-merge {command} [-c CONFIG] [options]\n")
    assert HEADINGS[command] in out
    assert out.index(f"--{STAGES[command]} ") < out.index("--trainer.accelerator")
    assert "object at 0x" not in out


def test_fields_of_options_are_explained(capsys):
    _, out, _ = run(capsys, "sweep", "--help")
    assert "Points on the edge between each two tasks" in " ".join(out.split())
    _, out, _ = run(capsys, "merge", "--method.help", "TIES")
    assert "Fraction of the entries of a task vector to keep" in " ".join(out.split())
    _, out, _ = run(capsys, "merge", "--correction.help")
    assert "Strength of the pull to the prior" in " ".join(out.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_printed_configs_can_be_read_again(command, capsys, tmp_path):
    own = {
        "merge": ("--pool=p", "--output=m", "--method=TIES", "--method.density=0.3"),
        "sweep": ("--merged=m", "--output=s", "--grid.pairwise=5"),
        "compress": ("--pool=p", "--output=f", "--method=TALLCompress", "--method.threshold=0.2"),
        "export": ("--merged=m", "--output=f", "--preference.one=0.7", "--preference.two=0.3"),
    }.get(command, ("--model=tests.callbacks.project.Classifier",))
    code, out, err = run(capsys, command, *own, "--print_config")
    assert code == 0, err
    first = yaml.safe_load(out)
    (tmp_path / "printed.yaml").write_text(out)
    code, out, err = run(capsys, command, "-c", "printed.yaml", "--print_config")
    assert code == 0, err
    assert yaml.safe_load(out) == first
    if command == "merge":
        assert list(first)[:2] == ["pool", "output"]
        assert first["method"]["init_args"]["density"] == 0.3
    if command == "export":
        assert first["preference"] == {"one": 0.7, "two": 0.3}


# the dry run --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--dry_run", "true"], ["--dry-run"], ["--dry_run=true"], ["--dry-run", "true"]]
)
def test_a_dry_run_lists_the_parameters_and_writes_nothing(words, pool, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    given = ("--pool=pool", "--output=merged", "--method=TSVMerge", '--method.exclude=["net.2.*"]')
    code, out, err = run(capsys, "merge", *QUIET, *words, *given)
    assert code == 0, err
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "TSVMerge of 3 experts (one, three, two); nothing is written." in lines
    assert re.search(r"8×6 +float32 +TSVMerge +1$", lines["net.0.weight"])
    assert re.search(r"8 +float32 +mean of the task vectors +1$", lines["net.0.bias"])
    assert lines["net.2.weight"].endswith("average of the experts")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_of_a_mistake(pool, capsys):
    given = ("--pool=pool", "--output=merged", "--tasks=[one]", "--dry-run")
    code, _, err = run(capsys, "merge", *QUIET, *given)
    assert code == 1
    assert "a merge needs at least two experts" in err
    assert merged(capsys, "--dry-run", "false").tasks


# one file for all commands ------------------------------------------------------------------------

SUITE = """
trainer: {logger: false, enable_progress_bar: false, accelerator: cpu, devices: 1}
model: {class_path: tests.callbacks.project.Classifier, init_args: {lr: 0.5}}
data: {class_path: tests.distributed.suite.Suite}
fit:
  trainer: {max_epochs: 7}
merge: {pool: pool, output: merged, method: {class_path: TIES, init_args: {density: 0.5}}}
sweep: {merged: merged, output: sweep, grid: {pairwise: 3, response: 3, lattice: 0}}
compress: {pool: pool, output: small/experts.safetensors, method: {class_path: TALLCompress}}
export: {merged: merged, output: out.safetensors, preference: {one: 1.0}}
"""


def test_one_file_serves_all_commands(pool, tmp_path, capsys):
    (tmp_path / "suite.yaml").write_text(SUITE)
    for command in ("merge", "sweep", "compress", "export"):
        code, out, err = run(capsys, command, "-c", "suite.yaml")
        assert code == 0, out + err
    assert MergedModel.load("merged").record["method"]["init_args"]["density"] == 0.5
    assert (tmp_path / "sweep" / "report.html").exists()
    assert (tmp_path / "out.safetensors").exists()
    assert MaskedExperts(tmp_path / "small" / "experts.safetensors").tasks == (
        "one",
        "three",
        "two",
    )
    # a later word has the last say
    run(capsys, "merge", "-c", "suite.yaml", "--method=TaskArithmetic", "--method.scale=0.4")
    assert MergedModel.load("merged").record["method"]["init_args"]["scale"] == 0.4


def test_a_section_adds_to_the_common_groups():
    fit = yaml.safe_load(restricted(SUITE, "fit"))
    assert fit["trainer"]["max_epochs"] == 7
    assert fit["trainer"]["logger"] is False
    assert not {"merge", "sweep", "export", "fit", "pool"} & set(fit)
    assert yaml.safe_load(restricted(SUITE, "merge"))["pool"] == "pool"
    with pytest.raises(ValueError, match="no YAML mapping"):
        restricted("[1,\n2]", "fit")


def test_environment_variables(pool, monkeypatch, capsys):
    monkeypatch.setenv("PL_MERGE__POOL", "pool")
    monkeypatch.setenv("PL_MERGE__OUTPUT", "merged")
    monkeypatch.setenv("PL_MERGE__TASKS", "[three, one]")
    code, out, err = run(capsys, "merge", *QUIET)
    assert code == 0, out + err
    assert MergedModel.load("merged").tasks == ["three", "one"]


# merge --------------------------------------------------------------------------------------------


def test_methods_and_corrections_by_their_names(pool, capsys):
    model = merged(capsys, "--method", "TIES", "--method.density", "0.2")
    assert model.record["method"]["class_path"].endswith("TIES")
    assert model.record["method"]["init_args"]["density"] == 0.2
    assert model.options.beta == "auto"
    model = merged(capsys, "--correction", "paper")
    assert (model.options.beta, model.options.beta_mode) == (0.1, "absolute")
    model = merged(capsys, "--correction.beta", "0.1")
    assert (model.options.beta, model.options.beta_mode) == (0.1, "relative")
    model = merged(capsys, "--correction", "null", "--tasks", "[one, two]")
    assert (model.statistics, model.tasks) == ({}, ["one", "two"])


def test_it_is_merge_experts(pool, capsys):
    model = merged(capsys)
    expected = merge_experts(pool)
    x = torch.randn(3, 6)
    for task in sorted(TASKS):
        for found in (model, expected):
            assert found.tasks == sorted(TASKS)
        torch.testing.assert_close(
            model.with_preference({"one": 1.0}, task)(x),
            expected.with_preference({"one": 1.0}, task)(x),
        )


# mistakes -----------------------------------------------------------------------------------------

MISTAKES = {
    "no pool": (("merge", "--pool=none", "--output=m"), "is no expert pool"),
    "unknown task": (
        ("merge", "--pool=pool", "--output=m", "--tasks=[one, x]"),
        "unknown tasks ['x']",
    ),
    "no merged model": (("export", "--merged=none", "--output=f", "--preference.one=1"), "none"),
    "no suite": (("sweep", "--merged=merged", "--output=s"), "sweep needs the tasks' test sets"),
    "preference": (
        ("export", "--merged=merged", "--output=f", "--preference.x=1"),
        "unknown task",
    ),
    "negative": (
        ("export", "--merged=merged", "--output=f", "--preference.one=-1"),
        "'one' is -1.0",
    ),
    "rank": (
        ("compress", "--pool=pool", "--output=f", "--method.rank=0"),
        "rank must be at least 1",
    ),
    "unwritable": (("merge", "--pool=pool", "--output=/proc/m"), "cannot write /proc/m"),
    "no file": (("merge", "-c", "none.yaml"), "none.yaml does not exist"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_line(name, pool, capsys):
    merge_experts(pool).save("merged")
    args, message = MISTAKES[name]
    code, out, err = run(capsys, *args[:1], *QUIET, *args[1:])
    lines = [line for line in err.splitlines() if line.startswith("lightning-merge: error: ")]
    assert code == 1, out + err
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err
    assert not any((pool.path.parent / name).exists() for name in "mfs")


def test_unknown_keys_are_named(pool, tmp_path, capsys):
    code, _, err = run(capsys, "merge", "--pool=pool", "--output=m", "--densty=1")
    assert code == 2
    assert "densty" in err
    (tmp_path / "bad.yaml").write_text("merge: {pool: pool, output: m, methd: TIES}\n")
    code, _, err = run(capsys, "merge", "-c", "bad.yaml")
    assert code == 2
    assert "methd" in err
    code, _, err = run(capsys, "merge", "--output=m")
    assert code == 2
    assert "pool" in err


# a project of somebody else -----------------------------------------------------------------------


def project(*args):
    """The project's own ``train.py``: a plain LightningCLI."""
    LightningCLI(args=list(args), save_config_callback=None)


FIT = ("--trainer.max_epochs=1", "--trainer.enable_model_summary=false", "--data.seed=1")
EXPERIMENT = """
model: {class_path: tests.callbacks.project.Classifier}
data: {class_path: tests.callbacks.project.Points}
trainer:
  logger: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.EarlyStopping
      init_args: {monitor: val_loss}
"""


def test_a_plain_lightning_cli_takes_the_callback(tmp_path):
    (tmp_path / "exp.yaml").write_text(EXPERIMENT)
    project(
        *("fit", "-c", "exp.yaml", *QUIET, *FIT),
        "--trainer.callbacks+=lightning_merge.callbacks.MergeCallback",
        *("--trainer.callbacks.pool=pool", "--trainer.callbacks.task=one"),
        *("--trainer.callbacks.head=net.9", "--trainer.callbacks.network=model"),
    )
    assert ExpertPool.open("pool").tasks == ["one"]


def test_the_preset_adds_the_callback(tmp_path, request):
    (tmp_path / "exp.yaml").write_text(EXPERIMENT)
    preset = request.config.rootpath / "callbacks" / "presets" / "merge.yaml"
    project(
        *("fit", "-c", "exp.yaml", "-c", str(preset), *QUIET, *FIT),
        *("--trainer.callbacks.task=one", "--trainer.callbacks.head=net.9"),
        "--trainer.callbacks.network=model",
    )
    assert ExpertPool.open("runs/pool").tasks == ["one"]


def test_the_callback_in_the_configs_of_both_command_lines_is_plain_data(tmp_path, capsys):
    (tmp_path / "exp.yaml").write_text(EXPERIMENT)
    method = {"class_path": "lightning_merge.methods.TIES", "init_args": {"density": 0.5}}
    ours = (
        "--trainer.callbacks+=lightning_merge.callbacks.MergeCallback",
        "--trainer.callbacks.pool=pool",
        '--trainer.callbacks.model={"class_path": "tests.callbacks.project.Net"}',
        f"--trainer.callbacks.method={json.dumps(method)}",
    )
    for command_line in (project, lambda *args: main(list(args))):
        with pytest.raises(SystemExit):
            command_line("fit", "-c", "exp.yaml", *ours, "--print_config")
        callbacks = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
        found = callbacks[-1]["init_args"]
        assert found["model"] == {"class_path": "tests.callbacks.project.Net"}
        assert found["method"] == method
        assert json.loads(json.dumps(found)) == found
