"""A small project for runs in one and in two processes; executed as a script by popen ``ddp``."""

import os
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_merge.cli import main
from tests.callbacks.project import Classifier, Points, samples


class Normed(nn.Module):
    """A network with a batch norm, whose head is ``head``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


class Module(Classifier):
    """The user's module; two processes train alike, so that only the statistics can differ."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__(lr)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.model = Normed()

    def on_train_end(self):
        # A batch norm sees other batches in each process: give the experts known weights.
        task = self.trainer.datamodule.task
        generator = torch.Generator().manual_seed(1 + TASKS.index(task))
        with torch.no_grad():
            for value in self.model.parameters():
                value += 0.05 * torch.randn(value.shape, generator=generator)
            for value in (self.model.body[1].running_mean, self.model.body[1].running_var):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            self.model.body[1].num_batches_tracked.fill_(3)  # two processes take fewer steps


TASKS = ["one", "two", "three"]


class Suite(LightningDataModule):
    """Odd numbers of samples, and a task with fewer batches than processes."""

    def __init__(self, task: str | None = None, prepared: str | None = None) -> None:
        super().__init__()
        self.task, self.prepared = task, prepared
        self.ready = False

    def prepare_data(self):
        if self.prepared:
            with Path(self.prepared).open("a") as file:
                file.write("prepared\n")

    def setup(self, stage):
        self.ready = True

    def train_dataloader(self):
        return DataLoader(Points().dataset(0, 8), batch_size=4)

    def calibration_dataset(self, task):
        return samples(TASKS.index(task), {"one": 37, "two": 23, "three": 301}[task])[0]

    def test_dataset(self, task):
        assert self.ready
        return TensorDataset(*samples(TASKS.index(task), {"one": 37, "two": 7, "three": 1}[task]))

    def dataloader(self, dataset):
        return DataLoader(dataset, batch_size=8, shuffle=True)


def stages(out: Path, *trainer: str) -> None:
    """Fit three experts (the last fit merges), merge once more, and sweep: the command line."""
    trainer = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", *trainer)
    module, data = "--model=tests.distributed.suite.Module", "--data=tests.distributed.suite.Suite"
    for task in TASKS:
        main(
            [
                *("fit", *trainer, module, data, f"--data.task={task}"),
                *("--trainer.max_epochs=1", "--trainer.logger=false"),
                "--trainer.enable_checkpointing=false",
                "--trainer.enable_model_summary=false",
                "--trainer.callbacks+=lightning_merge.callbacks.MergeCallback",
                f"--trainer.callbacks.pool={out}/pool",
                "--trainer.callbacks.head=head",
                "--trainer.callbacks.network=model",
                f"--trainer.callbacks.tasks={TASKS}",
            ]
        )
    pool = f"--pool={out}/pool"
    main(["merge", *trainer, module, pool, f"--output={out}/again", "--batch_size=8"])
    grid = ("--grid.pairwise=3", "--grid.response=3", "--grid.lattice=2")
    folders = (f"--merged={out}/merged", f"--output={out}/sweep")
    prepared = f"--data.prepared={out}/prepared.txt"
    main(["sweep", *trainer, module, data, prepared, *folders, *grid])


if __name__ == "__main__":
    torch.set_num_threads(1)
    stages(Path(os.environ["OUT"]), *os.environ["TRAINER"].split())
