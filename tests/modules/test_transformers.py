import json

import pytest
import torch

from lightning_merge.modules import ExpertModule, sequence_classifier
from lightning_merge.modules.transformers import transformers_spec
from lightning_merge.pool import build_network
from tests.data.tiny_text import save_encoder

transformers = pytest.importorskip("transformers", reason="the extra 'text' is not installed")


@pytest.fixture
def encoder(tmp_path):
    return save_encoder(tmp_path / "encoder")


def batch(n=3, length=5):
    mask = torch.ones(n, length, dtype=torch.int64)
    mask[0, 3:] = 0
    return {"input_ids": torch.randint(5, 30, (n, length)), "attention_mask": mask}


def test_it_is_the_classifier_of_transformers_with_the_saved_weights(encoder):
    network = sequence_classifier(encoder, num_labels=3)
    assert type(network) is transformers.BertForSequenceClassification
    assert network.training
    saved = transformers.BertModel.from_pretrained(encoder).state_dict()
    for name, value in saved.items():
        assert torch.equal(network.bert.state_dict()[name], value), name
    drawn = sequence_classifier(encoder, pretrained=False)
    name = "encoder.layer.0.output.dense.weight"
    assert not torch.equal(drawn.bert.state_dict()[name], saved[name])


def test_frozen_parts_get_no_gradient(encoder):
    network = sequence_classifier(encoder, frozen=("bert.embeddings", "bert.encoder.layer.0"))
    network(**batch()).logits.sum().backward()
    without = {name for name, value in network.named_parameters() if value.grad is None}
    assert without
    assert all(n.startswith(("bert.embeddings.", "bert.encoder.layer.0.")) for n in without)
    with pytest.raises(ValueError, match="cannot freeze 'bert.embed'.*children are bert, dropout"):
        sequence_classifier(encoder, frozen=("bert.embed",))


def test_the_spec_is_plain_data_that_builds_the_same_network(encoder):
    network = sequence_classifier(encoder, num_labels=4)
    spec = json.loads(json.dumps(transformers_spec(network)))
    built = build_network(spec)
    assert type(built) is type(network)
    built.load_state_dict(network.state_dict())
    inputs = batch()
    torch.testing.assert_close(
        built.eval()(**inputs).logits, network.eval()(**inputs).logits, rtol=0, atol=0
    )
    assert transformers_spec(torch.nn.Linear(1, 1)) is None


def test_an_expert_takes_named_inputs_and_sizes_its_head(encoder):
    module = ExpertModule(network=sequence_classifier(encoder), head="classifier", num_classes=5)
    assert module(batch()).shape == (3, 5)
    assert module.network.config.num_labels == 5
    assert module.network_spec["class_path"].endswith("BertForSequenceClassification")
    loss = module.loss(module(batch()), torch.tensor([0, 4, 2]))
    assert torch.isfinite(loss)


def test_a_folder_without_an_encoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot build a classifier from"):
        sequence_classifier(str(tmp_path))
