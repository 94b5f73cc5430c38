"""Batches as a project's own loops see them: through its transfer hooks."""

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer

HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")
LIBRARIES = ("lightning.", "pytorch_lightning.")


def through_hooks(batches: Iterable[Any], *owners: object) -> Iterable[Any]:
    """Pass batches through the transfer hooks, where one of the owners has its own.

    Args:
        batches: Batches; where they have a length it is kept.
        owners: Datamodule and module (or ``None``); of each hook the first that overrides it is
            asked, as Lightning does.
    """
    hooks = [found for name in HOOKS if (found := _overridden(name, owners)) is not None]
    return _Hooked(batches, hooks) if hooks else batches


@contextmanager
def evaluating(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Let hooks see a validation: augmentations ask ``trainer.training`` or ``self.training``."""
    modes = {part: part.training for part in module.modules()}
    stage = trainer.state.stage
    trainer.validating = True
    module.eval()
    try:
        yield
    finally:
        trainer.state.stage = stage
        for part, mode in modes.items():
            part.training = mode


def _overridden(name: str, owners: Iterable[object]) -> Any:
    for owner in owners:
        hook = getattr(type(owner), name, None)
        if hook is not None and not hook.__module__.startswith(LIBRARIES):
            return getattr(owner, name)
    return None


class _Hooked:
    def __init__(self, batches: Iterable[Any], hooks: list[Any]) -> None:
        self._batches, self._hooks = batches, hooks

    def __len__(self) -> int:
        return len(self._batches) if isinstance(self._batches, Sized) else 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            for hook in self._hooks:
                batch = hook(batch, 0)
            yield batch
