"""A user's own Lightning project, which knows nothing of this package."""

import dataclasses

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """Backbone and head in one ``nn.Sequential``; the head is ``net.9``."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(6, 8)]
        for _ in range(4):
            layers += [nn.GELU(), nn.Linear(8, 8)]
        self.net = nn.Sequential(*layers, nn.Linear(8, classes))

    def forward(self, x):
        return self.net(x)


class Classifier(LightningModule):
    """A module with a network in ``model``, written by somebody else."""

    def __init__(self, lr: float = 0.05, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = Net()
        self.lr = lr

    def forward(self, x):
        return self.model(x)

    def scores_of(self, batch):
        return self(batch[0]), batch[1]

    def training_step(self, batch, batch_idx):
        scores, labels = self.scores_of(batch)
        return nn.functional.cross_entropy(scores, labels)

    def validation_step(self, batch, batch_idx):
        scores, labels = self.scores_of(batch)
        self.log("val_loss", nn.functional.cross_entropy(scores, labels), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.scores_of(batch)[0]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Whole(Classifier):
    """The module is itself the network: its head is ``net.9``."""

    def __init__(self, lr: float = 0.05) -> None:
        LightningModule.__init__(self)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = Net().net
        self.lr = lr

    def forward(self, x):
        return self.net(x)


class Compiled(Classifier):
    """Compiles its network when a stage begins."""

    def setup(self, stage):
        self.model = torch.compile(self.model, backend="eager")


class WithTeacher(Classifier):
    """Has a second network of the same names, found before the one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.ema = Net().requires_grad_(False)


def samples(seed: int = 0, count: int = 21):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return x, (x[:, seed % 6] > 0).long() + (x[:, 5] > 1).long()


class Points(LightningDataModule):
    """Labelled points; their order is that of the numbers in the first column of ``order``."""

    def __init__(self, seed: int = 0, count: int = 21, val_count: int = 13) -> None:
        super().__init__()
        self.seed, self.count, self.val_count = seed, count, val_count

    def dataset(self, seed, count):
        return TensorDataset(*samples(seed, count))

    def train_dataloader(self):
        return DataLoader(self.dataset(self.seed, self.count), batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.dataset(self.seed + 100, self.val_count), batch_size=5)

    def test_dataloader(self):
        return self.val_dataloader()

    def predict_dataloader(self):
        return self.val_dataloader()


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    label: torch.Tensor
