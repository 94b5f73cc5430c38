"""The twin of ``MergeCallback`` for projects on ``pytorch_lightning``."""

from lightning_merge.callbacks.recording import Recording

try:
    from pytorch_lightning import Callback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "lightning_merge.callbacks.pl serves projects on pytorch_lightning, which is not "
        "installed; with lightning, use lightning_merge.callbacks.MergeCallback."
    ) from error


class MergeCallback(Recording, Callback):  # type: ignore[misc] # the twin's Trainer
    """Records a fit's base and expert in a pool; merges when the declared tasks are all in.

    The same as :class:`lightning_merge.callbacks.MergeCallback` in all but its base class.
    """
