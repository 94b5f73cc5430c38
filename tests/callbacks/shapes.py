"""LightningCLI projects of other people, in the shapes that they have; none knows of merging."""

import copy
import dataclasses

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryAUROC

from tests.callbacks.project import samples


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


class Extractor(nn.Sequential):
    def __init__(self, width: int = 8):
        super().__init__(nn.Linear(6, width), nn.GELU(), nn.Linear(width, width), nn.GELU())


class XRay(LightningModule):
    """``backbone`` is a string; ``feature_extractor`` and a deep ``fc`` end in one binary logit."""

    def __init__(self, backbone: str = "small", lr: float = 0.05):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = backbone
        self.feature_extractor = seeded(Extractor)
        self.fc = seeded(lambda: nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 1)))
        self.auroc = BinaryAUROC()
        self.lr = lr

    def forward(self, x):
        return self.fc(self.feature_extractor(x)).squeeze(1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.binary_cross_entropy_with_logits(self(x), (y > 0).float())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.auroc.update(self(x), (y > 0).long())
        self.log("test_auroc", self.auroc)
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained or self.parameters(), lr=self.lr)


class OneSequential(XRay):
    """``net`` is one ``nn.Sequential`` with backbone and head in it."""

    def __init__(self, lr: float = 0.05):
        LightningModule.__init__(self)
        body = seeded(lambda: [*Extractor(), nn.Linear(8, 1)])
        self.net = nn.Sequential(*body)
        self.auroc = BinaryAUROC()
        self.lr = lr

    def forward(self, x):
        return self.net(x).squeeze(1)


class CompiledInSetup(XRay):
    def setup(self, stage):
        self.feature_extractor = torch.compile(self.feature_extractor, backend="eager")


class LiveHyperparameters(XRay):
    """Live modules among the hyper-parameters: its checkpoints need unpickling."""

    def __init__(self, loss: nn.Module | None = None, lr: float = 0.05):
        LightningModule.__init__(self)
        loss = loss or nn.BCEWithLogitsLoss()
        self.save_hyperparameters()
        self.feature_extractor = seeded(Extractor)
        self.fc = seeded(lambda: nn.Linear(8, 1))
        self.auroc, self.lr, self.loss = BinaryAUROC(), lr, loss


class Encoder(nn.Module):
    """A small text encoder with named inputs."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        tokens = torch.tanh(self.mix(self.embedding(input_ids)))
        mask = attention_mask.unsqueeze(-1).float()
        return {"logits": self.classifier((tokens * mask).sum(1) / mask.sum(1))}


class Text(XRay):
    """Dict batches: ``input_ids``, ``attention_mask``, ``labels``."""

    def __init__(self, lr: float = 0.05):
        LightningModule.__init__(self)
        self.model = seeded(Encoder)
        self.lr = lr

    def training_step(self, batch, batch_idx):
        batch = dict(batch)
        labels = batch.pop("labels")
        return nn.functional.cross_entropy(self.model(**batch)["logits"], labels)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.training_step(batch, batch_idx))


class Records(XRay):
    """Batches are dataclasses."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch.x, batch.y), batch_idx)

    def test_step(self, batch, batch_idx):
        super().test_step((batch.x, batch.y), batch_idx)


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor


class Tables(LightningDataModule):
    """Points with labels, of one task; batches are tuples."""

    def __init__(self, seed: int = 0, count: int = 40):
        super().__init__()
        self.seed, self.count = seed, count

    def loader(self, seed, shuffle=False):
        return DataLoader(TensorDataset(*samples(seed, self.count)), 8, shuffle)

    def train_dataloader(self):
        return self.loader(self.seed, shuffle=True)

    def val_dataloader(self):
        return self.loader(self.seed + 6)

    def test_dataloader(self):
        return self.loader(self.seed + 12)


class Sentences(Tables):
    def loader(self, seed, shuffle=False):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(11, (self.count, 5), generator=generator)
        mask = (torch.rand(self.count, 5, generator=generator) > 0.3).long()
        mask[:, 0] = 1
        items = [
            {"input_ids": i, "attention_mask": m, "labels": i.sum() % 3}
            for i, m in zip(ids, mask, strict=True)
        ]
        return DataLoader(items, 8, shuffle)


class RecordTables(Tables):
    def loader(self, seed, shuffle=False):
        data = TensorDataset(*samples(seed, self.count))
        return DataLoader(data, 8, shuffle, collate_fn=collate)


def collate(items):
    return Record(*(torch.stack(column) for column in zip(*items, strict=True)))


class Unfreeze(BaseFinetuning):
    """Trains the head alone in the first epoch, then the backbone too."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.feature_extractor)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.feature_extractor, optimizer, lr=0.05)


class Scaling(Tables):
    """Inputs are whole numbers; the datamodule scales them after the transfer, as on a GPU."""

    def loader(self, seed, shuffle=False):
        x, y = samples(seed, self.count)
        return DataLoader(TensorDataset((100 * x).long(), y), 8, shuffle)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return x.float() / 100, y


class Augmenting(XRay):
    """Adds noise after the transfer while it trains, and marks what passed before it."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return x * 2, y

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = copy.copy(batch)
        return (x + 100 if self.trainer.training else x + 1), y
