"""Which samples a step sees: a function of seed, task and step, so that a run can continue."""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

from lightning_merge.calibration import CalibrationInputs, check_finite_batch
from lightning_merge.functional.seeds import seed_of


def rows_of(seed: int, task: str, step: int, size: int, batch_size: int) -> Tensor:
    """Samples of one step: epoch after epoch in a new order, without gaps.

    Where a task has fewer samples than a batch, they are drawn with replacement.

    Args:
        seed: Of the run.
        task: Its name; tasks are independent of one another's order.
        step: Counted from zero.
        size: Samples of the task.
        batch_size: How many are wanted.
    """
    if size < batch_size:
        generator = torch.Generator().manual_seed(seed_of(seed, task, "draw", step))
        return torch.randint(size, (batch_size,), generator=generator)
    epoch, offset = divmod(step * batch_size, size)
    rows = _order(seed, task, epoch, size)[offset : offset + batch_size]
    if len(rows) < batch_size:
        more = _order(seed, task, epoch + 1, size)[: batch_size - len(rows)]
        rows = torch.cat([rows, more])
    return rows


@lru_cache(maxsize=256)
def _order(seed: int, task: str, epoch: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed_of(seed, task, "epoch", epoch))
    return torch.randperm(size, generator=generator)


def checked_digest(task: str, inputs: CalibrationInputs, batch_size: int = 256) -> str:
    """Fingerprint of a task's inputs; every value is looked at once.

    Raises:
        ValueError: If one is NaN or infinite.
    """
    digest = hashlib.sha256(str(len(inputs)).encode())
    for rows in inputs.batches(batch_size):
        batch = inputs[rows]
        named = batch if isinstance(batch, dict) else {"inputs": batch}
        check_finite_batch(task, batch, range(rows.start, rows.stop))
        for name, value in named.items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
