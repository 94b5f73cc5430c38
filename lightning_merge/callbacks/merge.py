"""Record the expert that a fit makes, and merge when the last one is in."""

from lightning.pytorch import Callback

from lightning_merge.callbacks.recording import Recording


class MergeCallback(Recording, Callback):
    """Records a fit's base and expert in a pool; merges when the declared tasks are all in.

    The arguments are those of :class:`~lightning_merge.callbacks.recording.Recording`: plain data,
    from a script, LightningCLI or Hydra.
    """
