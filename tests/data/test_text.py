import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict

from lightning_merge.data import TaskSuite, TextTask, Tokens
from tests.data.tiny_text import save_tokenizer, sentences


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def tokens(tmp_path):
    pytest.importorskip("transformers", reason="the extra 'text' is not installed")
    return Tokens(save_tokenizer(tmp_path / "tokenizer"), max_length=6)


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    sentences(80, ["fruit", "tool"], [0.8, 0.2], seed=0).save_to_disk(path)
    return str(path)


def length(text):
    return {"input_ids": torch.tensor([len(text)])}


def test_texts_are_cut_and_padded_to_one_length(tokens):
    short, long = tokens("The apple"), tokens("a saw is near the old big dog")
    pad, unknown, start, end = 0, 1, 2, 3
    assert short["input_ids"].tolist()[0] == start
    assert short["input_ids"].tolist()[3:] == [end, pad, pad]
    assert short["attention_mask"].tolist() == [1, 1, 1, 1, 0, 0]
    assert len(long["input_ids"]) == 6
    assert long["input_ids"][-1] == end
    assert long["attention_mask"].sum() == 6
    assert unknown in tokens("zebra")["input_ids"].tolist()
    assert {value.dtype for value in short.values()} == {torch.int64}


def test_batches_are_named_tensors_and_labels(disk, tokens):
    suite = TaskSuite({"words": TextTask(disk, tokens)}, batch_size=8)
    inputs, labels = next(iter(suite.train_dataloader()))
    assert {name: tuple(x.shape) for name, x in inputs.items()} == {
        "input_ids": (8, 6),
        "attention_mask": (8, 6),
    }
    assert labels.shape == (8,)
    assert suite.num_classes == 2
    unlabeled = next(iter(suite.predict_dataloader()))
    assert set(unlabeled) == {"input_ids", "attention_mask"}


def test_splits_are_disjoint_and_classes_have_names(disk):
    task = TextTask(disk, length, validation_size=10, calibration_size=0.25)
    sizes = [len(task.train()), len(task.validation()), len(task.calibration()), len(task.test())]
    assert sizes == [35, 10, 15, 20]
    assert task.class_names == ["fruit", "tool"]


def test_a_column_without_texts_is_refused(tmp_path):
    path = tmp_path / "numbers"
    data = Dataset.from_dict({"text": list(range(40)), "label": [0, 1] * 20})
    DatasetDict(train=data, test=data).save_to_disk(path)
    with pytest.raises(ValueError, match=r"column 'text' of .*int64.*; expected texts"):
        TextTask(str(path), length).test()
    with pytest.raises(ValueError, match="no column 'body'; it has text, label"):
        TextTask(str(path), length, text="body").test()


def test_sizes_and_tokenizers_are_checked(disk, tmp_path):
    with pytest.raises(ValueError, match="number of texts, got validation_size 0"):
        TextTask(disk, length, validation_size=0)
    with pytest.raises(ValueError, match="has 60 texts, too few to hold out 50 for validation"):
        TextTask(disk, length, validation_size=50, calibration_size=10).train()
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        Tokens("anything", max_length=1)
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="cannot read a tokenizer from"):
        Tokens(str(tmp_path))("a text")
    with pytest.raises(ValueError, match="'no_such_package', which is not installed"):
        Tokens("no_such_package:model")("a text")
