"""One stage on two processes, of which the second is killed in the middle; executed as a script."""

import os
import signal
import sys
from pathlib import Path

import torch

from lightning_merge.cli import main
from tests.callbacks.project import Classifier
from tests.distributed.suite import TASKS, Module, Normed

QUIET = (
    *("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"),
    *("--trainer.enable_progress_bar=false", "--trainer.logger=false"),
)


class Fragile(Normed):
    """Ends its process, as a machine that goes down does, at its second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def forward(self, x):
        self.batches += 1
        if os.environ.get("DIE") and os.environ.get("LOCAL_RANK") == "1" and self.batches > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


class Client(Module):
    def __init__(self) -> None:
        Classifier.__init__(self, 0.01)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.model = Fragile()


def stage(name: str, out: Path) -> None:
    module, data = "--model=tests.distributed.dying.Client", "--data=tests.distributed.suite.Suite"
    pool = f"{out}/pool"
    if name in TASKS:
        main(
            [
                *("fit", *QUIET, module, data, f"--data.task={name}"),
                *("--trainer.max_epochs=2", "--trainer.enable_checkpointing=false"),
                "--trainer.enable_model_summary=false",
                "--trainer.callbacks+=lightning_merge.callbacks.MergeCallback",
                *(f"--trainer.callbacks.pool={pool}", "--trainer.callbacks.head=head"),
                *("--trainer.callbacks.network=model", f"--trainer.callbacks.tasks={TASKS}"),
            ]
        )
    elif name == "merge":
        words = (f"--pool={pool}", f"--output={out}/merged", "--batch_size=8")
        main(["merge", *QUIET, module, *words])
    else:
        grid = ("--grid.pairwise=3", "--grid.response=3", "--grid.lattice=2")
        folders = (f"--merged={out}/merged", f"--output={out}/sweep")
        main(["sweep", *QUIET, module, data, *folders, *grid])


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert sys.argv[1:] or "STAGE" in os.environ
    stage(os.environ["STAGE"], Path(os.environ["OUT"]))
