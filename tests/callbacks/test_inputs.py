import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_merge import ExpertPool
from lightning_merge.callbacks.inputs import unlabeled
from tests.callbacks.project import Classifier, Net, Points, Sample
from tests.callbacks.test_merge import callback, fit


class Named(Dataset):
    """Items are mappings, or dataclasses, of inputs and labels."""

    def __init__(self, size, kind=dict):
        self.size, self.kind = size, kind

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        item = {"x": torch.full((6,), float(index)), "label": torch.tensor(index % 3)}
        return item if self.kind is dict else self.kind(**item)


def stacked(items):
    return Sample(torch.stack([i.x for i in items]), torch.stack([i.label for i in items]))


class Mapped(Classifier):
    """Steps that read batches which are mappings, dataclasses or plain inputs."""

    def scores_of(self, batch):
        if isinstance(batch, torch.Tensor):
            return self(batch), torch.zeros(len(batch), dtype=torch.long)
        if dataclasses.is_dataclass(batch):
            batch = vars(batch)
        return self(batch["x"]), batch["label"]


class Stream(IterableDataset):
    def __iter__(self):
        for index in range(9):
            yield torch.full((6,), float(index)), torch.tensor(index % 3)


class Given(Points):
    """A datamodule that gives one loader for everything."""

    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self):
        return self.loader

    def val_dataloader(self):
        return self.loader


def first_column(tmp_path):
    inputs = ExpertPool.open(tmp_path / "pool").calibration("one")
    found = inputs.tensors()
    assert set(found) == {"inputs"}
    return found["inputs"][:, 0].tolist()


def column(count):
    values = torch.arange(float(count)).unsqueeze(1).expand(count, 6)
    return TensorDataset(values, torch.arange(count) % 3)


LOADERS = {
    "mappings": lambda: DataLoader(Named(9), 4, shuffle=True),
    "dataclasses": lambda: DataLoader(Named(9, Sample), 4, shuffle=True, collate_fn=stacked),
    "tensors": lambda: DataLoader(torch.arange(9.0).unsqueeze(1).expand(9, 6), 4, shuffle=True),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("source", ["val", "train"])
def test_batches_of_any_kind(tmp_path, kind, source):
    ours = callback(tmp_path, calibration=source)
    fit(tmp_path, ours, module=Mapped(lr=1e-3), data=Given(LOADERS[kind]()))
    assert first_column(tmp_path) == list(range(9))


SOURCES = {
    "tuples": (lambda: DataLoader(column(9), 4, shuffle=True), list(range(9))),
    "sorted by class": (lambda: DataLoader(column(25), 4), [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]),
    "subset": (lambda: DataLoader(column(9), 2, sampler=SubsetRandomSampler([7, 1, 4])), [1, 4, 7]),
    "weighted": (
        lambda: DataLoader(column(9), 4, sampler=WeightedRandomSampler([0.9] + [0.1] * 8, 20)),
        list(range(9)),
    ),
    "batch sampler": (lambda: DataLoader(column(3), batch_sampler=[[0, 2], [1, 1]]), [0, 1, 2]),
    "stream": (lambda: DataLoader(Stream(), 4), list(range(9))),
    "batches as items": (
        lambda: DataLoader([(torch.ones(2, 6) * i, torch.tensor([0, 1])) for i in (3, 5)], None),
        [3, 3, 5, 5],
    ),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_each_sample_is_taken_once_in_order(tmp_path, kind):
    loader, expected = SOURCES[kind]
    fit(tmp_path, callback(tmp_path), module=Classifier(lr=1e-3), data=Given(loader()))
    assert first_column(tmp_path) == expected


def test_several_validation_loaders_share_the_limit(tmp_path):
    class Two(Points):
        def val_dataloader(self):
            return [DataLoader(column(30), 4), DataLoader(column(10), 4)]

    class Indexed(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    fit(tmp_path, callback(tmp_path), module=Indexed(lr=1e-3), data=Two())
    assert first_column(tmp_path) == [0, 3, 7, 11, 15, 18, 22, 26, 0, 3]


def test_the_datamodules_calibration_dataset_comes_first(tmp_path):
    class Own(Points):
        task = "one"

        def calibration_dataset(self, task):
            assert task == "one"
            return [torch.full((6,), float(index)) for index in range(4)]

    fit(tmp_path, callback(tmp_path, task=None), data=Own())
    assert first_column(tmp_path) == [0, 1, 2, 3]


def test_training_inputs_where_there_is_nothing_else(tmp_path):
    class NoValidation(Points):
        val_dataloader = None

        def train_dataloader(self):
            return DataLoader(column(5), 2, shuffle=True)

    class OnlyTraining(Classifier):
        validation_step = None

    fit(tmp_path, callback(tmp_path), module=OnlyTraining(lr=1e-3), data=NoValidation())
    assert first_column(tmp_path) == list(range(5))
    with pytest.raises(ValueError, match="no calibration inputs from 'calibration'"):
        fit(tmp_path, callback(tmp_path, "two", calibration="calibration"), data=Points())


class Two(nn.Module):
    def forward(self, ids, mask):
        return ids


def test_named_inputs():
    batch = {"ids": torch.ones(2, 3), "mask": torch.zeros(2, 3), "labels": torch.ones(2)}
    assert set(unlabeled(batch, Two(), None)) == {"ids", "mask"}
    assert set(unlabeled(batch, Two(), ["ids"])) == {"ids"}
    assert torch.equal(unlabeled((batch["ids"], batch["labels"]), Net(), None), batch["ids"])
    with pytest.raises(ValueError, match=r"has ids, mask, labels, but Net.forward takes x"):
        unlabeled(batch, Net(), None)
    with pytest.raises(ValueError, match=r"no 'pixels' .*ids, mask, labels"):
        unlabeled(batch, Two(), ["pixels"])
    with pytest.raises(ValueError, match="a batch of str"):
        unlabeled("text", Two(), None)
