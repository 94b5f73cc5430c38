import json

import pytest
import torch
import yaml

from lightning_merge import merge_experts
from lightning_merge.card import model_card
from lightning_merge.merged_folder import record_scores
from lightning_merge.methods import TIES
from tests.networks import make, tuned


def front_matter(card):
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


@pytest.fixture
def saved(tmp_path):
    base = make("mlp")[0]
    experts = {task: tuned(base, seed) for seed, task in enumerate(("one", "t|wo"))}
    inputs = {task: torch.randn(40, 6) for task in experts}
    merge_experts(experts, TIES(density=0.3), inputs, base=base, head="net.9", check=False).save(
        tmp_path / "m", pictures={"interference.png": b"png"}
    )
    return tmp_path / "m"


def test_the_card_says_how_the_model_was_made(saved):
    head, body = front_matter((saved / "README.md").read_text())
    assert head["library_name"] == "lightning-merge"
    assert {"merge", "ties"} <= set(head["tags"])
    assert "license" not in head  # a comment asks the user for it
    assert "base_model" not in head
    for text in (
        "# 2 experts in one model",
        "| method | `TIES` |",
        "| density | `0.3` |",
        "| correction: prior | `auto` |",
        "| t\\|wo | 40 |",
        'MergedModel.load("path/of/this/folder", module=network)',
        'model.with_preference({"one": 0.7, "t|wo": 0.3})',
        "--preference.one 0.7",
        "![interference](interference.png)",
        "Made with lightning-merge",
    ):
        assert text in body
    assert "## Scores" not in body
    assert (saved / "interference.png").read_bytes() == b"png"


def test_the_code_of_the_card_runs(saved):
    body = (saved / "README.md").read_text()
    code = body.split("```python\n")[1].split("```")[0].replace("path/of/this/folder", str(saved))
    scope = {"network": make("mlp")[0], "inputs": torch.randn(3, 6)}
    exec(code, scope)
    assert scope["scores"].shape == (3, 3)


def test_scores_of_a_sweep(saved):
    row = {"raw": {"one": 0.5, "t|wo": None}, "raw_mean": 0.25, "normalized_mean": 0.9}
    summary = {"tasks": ["one", "t|wo"], "metric": "accuracy", "rows": {"one_hot": row}, "x": 1}
    record_scores(saved, summary)
    assert "| one hot | 0.500 |  | 0.250 | 0.900 |" in (saved / "README.md").read_text()
    assert "![interference]" in (saved / "README.md").read_text()
    manifest = json.loads((saved / "merged.json").read_text())
    assert manifest["record"]["scores"]["rows"] == {"one_hot": row}
    assert "x" not in manifest["record"]["scores"]


def test_a_pretrained_base_and_a_merge_without_correction():
    record = {
        "tasks": ["a"],
        "model": {
            "class_path": "timm.create_model",
            "init_args": {"model_name": "vit_tiny", "pretrained": True},
        },
        "correction": {"beta": 0.1},
        "record": {"base_fingerprint": "0123456789abcdef"},
    }
    head, body = front_matter(model_card(record))
    assert head["base_model"] == "timm/vit_tiny"
    assert "merged without a correction" in body
    assert "correction: beta" not in body
    assert "| base | `timm/vit_tiny`, `vit_tiny`, fingerprint `0123456789ab` |" in body
    assert 'MergedModel.load("path/of/this/folder")' in body
