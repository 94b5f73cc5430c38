"""Fits whose weights are shards (FSDP2), on two CPU processes; executed as a script."""

import os
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_merge.callbacks import MergeCallback
from tests.callbacks.project import Classifier, Net
from tests.distributed.suite import TASKS, Suite

MODEL = {"class_path": "tests.callbacks.project.Net", "init_args": {}}


class Sharded(Classifier):
    """Shards its layers when a stage begins; starts from the weights of ``Classifier``."""

    def configure_model(self):
        mesh = getattr(self, "device_mesh", None)
        if mesh is not None:
            for layer in self.model.net:
                fully_shard(layer, mesh=mesh["data_parallel"])
            fully_shard(self.model, mesh=mesh["data_parallel"])


class Data(Suite):
    """The suite, with samples that are the same for each number of processes."""

    def test_dataloader(self):
        return self.dataloader(self.test_dataset(self.task))


def fits(out: Path, tasks, **options) -> None:
    """Fit some experts on two processes; the last of all tasks merges."""
    for task in tasks:
        record = MergeCallback(
            str(out / "pool"), task, "net.9", "model", tasks=TASKS, model=MODEL, **options
        )
        Trainer(
            accelerator="cpu",
            devices=2,
            strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[record],
        ).fit(Sharded(), Data(task))


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert Net is not None
    fits(Path(os.environ["OUT"]), os.environ["TASKS"].split(","))
