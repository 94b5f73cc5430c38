"""A process that is gone: what the others say instead of a message of their transport."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistBackendError

SIGNS = (
    "Connection closed by peer",
    "Connection reset",
    "Read error",
    "Write error",
    "Broken pipe",
)
"""What gloo says where another process has ended."""


class LostProcessError(RuntimeError):
    """Another process of this stage ended in the middle of it."""


@contextmanager
def naming_lost_processes(what: str) -> Iterator[None]:
    """Turn an error of the transport into one that says what happened and what to do.

    Args:
        what: The stage, as in "the merge", and what is on disk.

    Raises:
        LostProcessError: Where another process has ended.
    """
    try:
        yield
    except (RuntimeError, DistBackendError) as error:
        lost = isinstance(error, DistBackendError) or any(sign in str(error) for sign in SIGNS)
        if not lost or isinstance(error, LostProcessError):
            raise
        raise LostProcessError(
            f"another process was killed or lost its connection during {what}. Files on disk are "
            "whole: those of before, or finished ones. Look at that process's own output (out of "
            "memory is the usual reason) and run the same command again."
        ) from error
