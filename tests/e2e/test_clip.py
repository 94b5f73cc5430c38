"""The configs of the eight-task benchmark, on stand-ins, through the real command line."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_merge import ExpertPool, MergedModel
from lightning_merge.cli import main
from lightning_merge.zero_shot import build_suite, read_prompts, write_heads
from tests.e2e.clip_standin import FOLDER, SCHEMAS, config_of, shrink, standin

pytestmark = pytest.mark.slow
METHODS = sorted(path.stem for path in (FOLDER / "methods").glob("*.yaml"))


def text_tower(texts):
    """Embeddings that depend on the text alone."""
    rows = []
    for text in texts:
        generator = torch.Generator().manual_seed(sum(map(ord, text)))
        rows.append(torch.randn(12, generator=generator))
    return torch.stack(rows)


def run_cli(*words):
    argv, sys.argv = sys.argv, ["lightning-merge"]
    try:
        main(list(words))
    finally:
        sys.argv = argv


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder with the stand-ins, zero-shot heads and eight experts."""
    folder = tmp_path_factory.mktemp("clip")
    datasets.disable_progress_bars()
    for number, task in enumerate(SCHEMAS):
        standin(folder / "data" / task, task, number)
    for name in (
        "suite",
        "trained_heads",
        "published_protocol",
        *(f"methods/{m}" for m in METHODS),
    ):
        path = folder / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = shrink(config_of(f"{name}.yaml"), folder)
        method = small.get("merge", {}).get("method", {})
        if "AdaMerging" in str(method):
            method["init_args"] |= {"steps": 2, "batch_size": 4}
        path.write_text(yaml.safe_dump(small, sort_keys=False), encoding="utf-8")
    suite = build_suite(yaml.safe_load((folder / "configs" / "suite.yaml").read_text()))
    write_heads(suite, read_prompts(FOLDER / "prompts.yaml"), text_tower, folder / "heads")
    for task in SCHEMAS:
        fit(folder, task)
    return folder


def fit(folder: Path, task: str, *more: str):
    configs = [str(folder / "configs" / f"{name}.yaml") for name in ("suite", *more)]
    words = [word for path in configs for word in ("--config", path)]
    run_cli("fit", *words, "--data.task", task)


def test_the_suite_names_the_published_data_sets():
    tasks = config_of("suite.yaml")["data"]["init_args"]["tasks"]
    found = {
        task: (spec["init_args"]["path"], spec["init_args"].get("name"))
        for task, spec in tasks.items()
    }
    assert found == {task: (path, name) for task, (path, name, _, _) in SCHEMAS.items()}


def test_experts_have_the_zero_shot_heads_unchanged(run):
    pool = ExpertPool.open(run / "pool")
    assert set(pool.tasks) == set(SCHEMAS)
    for task in SCHEMAS:
        made = load_file(run / "heads" / f"{task}.safetensors")
        kept = pool.head_state(task)
        assert set(made) == set(kept)
        for name, value in made.items():
            assert torch.equal(kept[name], value), (task, name)
        torch.testing.assert_close(made["weight"].norm(dim=1), torch.full((5,), 100.0))
        assert len(pool.calibration(task)) == 12
    assert any(not torch.equal(v, pool.expert("sun397")[k]) for k, v in pool.base.items())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_and_sweeps(run, method):
    own = yaml.safe_load((FOLDER / "methods" / f"{method}.yaml").read_text())["merge"]["method"]
    path = own if isinstance(own, str) else own["class_path"]
    module, _, name = path.rpartition(".")
    if not hasattr(__import__(module, fromlist=[name]), name):
        pytest.skip(f"{path} is not there yet")
    words = ["--config", str(run / "configs" / "suite.yaml")]
    words += ["--config", str(run / "configs" / "methods" / f"{method}.yaml")]
    run_cli("merge", *words)
    run_cli("sweep", *words)
    model = MergedModel.load(run / "merged" / method)
    assert model.record["method"]["class_path"].endswith(name)
    summary = json.loads((run / "sweep" / method / "summary.json").read_text())
    assert set(summary["tasks"]) == set(SCHEMAS)
    assert {"experts", "base", "uncorrected", "equal", "one_hot", "priority"} <= set(
        summary["rows"]
    )


def test_trained_heads_and_the_published_protocol(run):
    for task in ("mnist", "dtd"):
        fit(run, task, "trained_heads")
        fit(run, task, "published_protocol")
    trained = ExpertPool.open(run / "pool_trained_heads").head_state("mnist")
    fixed = load_file(run / "heads" / "mnist.safetensors")
    assert not torch.equal(trained["weight"], fixed["weight"])
    assert len(ExpertPool.open(run / "pool_transductive").calibration("mnist")) == 13


def test_the_preference_grid_is_an_option(run):
    words = ["--config", str(run / "configs" / "suite.yaml")]
    run_cli("merge", *words)
    run_cli("sweep", *words, "--grid.priority", "0.9", "--grid.response", "3")
    assert (run / "sweep" / "average" / "summary.json").exists()


def test_a_missing_head_is_explained(run, tmp_path):
    with pytest.raises(ValueError, match=r"no fixed head at .*dtd\.safetensors"):
        words = ("--model.heads", str(tmp_path / "none"), "--trainer.callbacks.overwrite", "true")
        config = str(run / "configs" / "suite.yaml")
        run_cli("fit", "--config", config, "--data.task", "dtd", *words)


@pytest.mark.parametrize("script", sorted((FOLDER / "slurm").glob("*.sh")), ids=lambda p: p.stem)
def test_scripts_are_sound_and_name_what_exists(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    text = script.read_text(encoding="utf-8").replace("$folder", "configs/clip_vit_b32")
    assert text.startswith("#!/bin/bash\n")
    assert "set -euo pipefail" in text
    for word in text.replace('"', " ").split():
        if word.startswith("configs/") and "$" not in word:
            assert (FOLDER.parents[1] / word).exists(), word
