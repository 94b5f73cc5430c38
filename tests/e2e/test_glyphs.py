"""The Glyphs suite, shrunk, through the real command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_merge import ExpertPool, MergedModel
from lightning_merge.cli import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TASKS = ("latin", "greek", "cyrillic")
SIZES = {"train_size": 64, "val_size": 16, "test_size": 33, "calibration_size": 40}


def shrunk(name: str, folder: Path) -> Path:
    """A config of the repository with fewer tasks, images and epochs, writing to a folder."""
    text = (ROOT / "configs" / name).read_text(encoding="utf-8")
    config = yaml.safe_load(text.replace("runs/glyphs", str(folder)))
    data = config["data"]["init_args"]
    data["tasks"] = {
        task: {**spec, "init_args": {**spec["init_args"], **SIZES}}
        for task, spec in data["tasks"].items()
        if task in (*TASKS, "base")
    }
    data["batch_size"] = 16
    config["trainer"] |= {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if "sweep" in config:
        config["sweep"]["grid"] = {"pairwise": 3, "response": 3, "lattice": 2}
    path = folder / name
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a finished run: base, three experts, merge, sweep and export."""
    folder = tmp_path_factory.mktemp("glyphs")
    base, suite = shrunk("glyphs_base.yaml", folder), str(shrunk("glyphs.yaml", folder))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lightning_merge.cli", "fit", "--config", str(base)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    argv, sys.argv = sys.argv, ["lightning-merge"]
    try:
        for task in TASKS:
            main(["fit", "--config", suite, "--data.task", task])
        main(["merge", "--config", suite])
        main(["sweep", "--config", suite])
        main(
            [
                *("export", "--config", suite, "--output", str(folder / "greek.safetensors")),
                *("--preference.greek", "0.7", "--preference.latin", "0.3", "--task", "greek"),
            ]
        )
    finally:
        sys.argv = argv
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_files_of_each_artifact(run):
    parts = ("experts", "heads", "calibration")
    assert files(run / "pool") == {
        *("pool.json", "base.safetensors"),
        *(f"{part}/{task}.safetensors" for part in parts for task in TASKS),
    }
    assert files(run / "merged") == {
        *("merged.json", "backbone.safetensors", "heads.safetensors", "correction.safetensors"),
        *("README.md", "interference.png"),
    }
    assert files(run / "sweep") == {
        *("results.parquet", "results.csv", "summary.json", "report.html"),
        *("front.png", "response.png", "ternary.png"),
    }


def test_the_pool_holds_the_base_that_was_fitted(run):
    pool = ExpertPool.open(run / "pool")
    state = torch.load(run / "base" / "base.ckpt", weights_only=True)["state_dict"]
    for name, value in pool.base.items():
        assert torch.equal(value, state[f"network.{name}"]), name
    for task in TASKS:
        assert len(pool.calibration(task)) == SIZES["calibration_size"]
        assert 0 <= pool.scores(task)["val/accuracy"] <= 1


def test_the_merged_model_loads_and_its_export_is_the_same(run):
    model = MergedModel.load(run / "merged")
    assert set(model.tasks) == set(TASKS)
    network = model.with_preference({"greek": 0.7, "latin": 0.3}, "greek")
    exported = load_file(run / "greek.safetensors")
    assert set(exported) == set(network.state_dict())
    for name, value in network.state_dict().items():
        torch.testing.assert_close(exported[name], value)
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 16)


def test_the_sweep_is_complete(run):
    summary = json.loads((run / "sweep" / "summary.json").read_text())
    assert set(summary["tasks"]) == set(TASKS)
    rows = {"experts", "base", "uncorrected", "equal", "one_hot", "priority"}
    assert rows <= set(summary["rows"])
    for row in rows:
        for value in summary["rows"][row]["raw"].values():
            assert value * SIZES["test_size"] == pytest.approx(round(value * SIZES["test_size"]))
    assert {"merge", "calibrate", "sweep_merged"} <= set(summary["timings"])
    table = pd.read_parquet(run / "sweep" / "results.parquet")
    pd.testing.assert_frame_equal(table, pd.read_csv(run / "sweep" / "results.csv"))
    page = (run / "sweep" / "report.html").read_text(encoding="utf-8")
    assert "https://" not in page.replace("https://www.w3.org", "") or "<script src" not in page
    for name in ("front.png", "response.png", "ternary.png"):
        assert (run / "sweep" / name).read_bytes().startswith(b"\x89PNG")


def test_a_second_sweep_replaces_the_first(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-merge"])
    before = pd.read_parquet(run / "sweep" / "results.parquet")
    names = files(run / "sweep")
    main(["sweep", "--config", str(run / "glyphs.yaml")])
    assert files(run / "sweep") == names
    pd.testing.assert_frame_equal(pd.read_parquet(run / "sweep" / "results.parquet"), before)


def test_the_same_expert_is_not_fitted_twice(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-merge"])
    with pytest.raises(ValueError, match="already has an expert 'greek'"):
        main(["fit", "--config", str(run / "glyphs.yaml"), "--data.task", "greek"])
