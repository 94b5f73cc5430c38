"""Writing files so that a killed run leaves the old one or the new one, never half of one."""

import ctypes
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

NUMBERS = re.compile(r"\[\n\s*([-\d.eE+]+(?:,\n\s*[-\d.eE+]+)*)\n\s*\]")
"""A list of numbers in indented JSON; no string has a line break in it."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it takes the place of ``path``.

    On an error the temporary file is removed and ``path`` is as it was. The folder is made.

    Raises:
        OSError: If the folder cannot be made or written to, naming the path and the way out.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}.", suffix=f".tmp{path.suffix}"
        )
    except OSError as error:
        raise _cannot_write(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside ``path``; on success it takes the place of ``path``.

    On an error the temporary folder is removed and ``path`` is as it was.

    Raises:
        OSError: If the folder cannot be made or written to, naming the path and the way out.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    except OSError as error:
        raise _cannot_write(path, error) from error
    old = temporary.with_suffix(".old")
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if not path.exists():
            temporary.rename(path)
        elif not _exchange(temporary, path):
            path.rename(old)
            temporary.rename(path)
    finally:
        if old.exists() and not path.exists():  # the second rename failed
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, in one step; a list of numbers stands on one line."""
    text = json.dumps(value, indent=2, allow_nan=False)
    text = NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, in one step.

    Raises:
        OSError: If the disk is full or the path cannot be written to.
    """
    with replacing(path) as temporary:
        save_tensors(temporary, tensors, metadata)


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors to a path given by :func:`replacing`.

    Raises:
        OSError: If the disk is full or the path cannot be written to.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # No tensors with empty metadata would give a header that safetensors itself cannot read.
    header = dict(metadata) if metadata else None
    try:
        save_file(contiguous, path, metadata=header)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error


def read_data(path: Path) -> dict[str, Any]:
    """Read a JSON object that is no manifest.

    Raises:
        ValueError: If it is missing or damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is missing or not readable ({error}). Restore it, or merge again."
        ) from error


def read_json(path: str | Path, format_name: str, newest: int) -> dict[str, Any]:
    """Read a manifest and check its format.

    Args:
        path: The JSON file, an object with ``{"format": {"name": ..., "version": ...}}``.
        format_name: What it must be.
        newest: The newest version that this release reads.

    Raises:
        ValueError: If it is missing, damaged, of another kind, or newer than this release.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        found = value["format"]["name"], int(value["format"]["version"])
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} does not exist, so {path.parent} is no {format_name}. Check the path, or run "
            "the step that makes it."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a readable {format_name} manifest ({error}). Restore it, or make the "
            f"{format_name} again."
        ) from error
    if found[0] != format_name:
        raise ValueError(f"{path} describes a {found[0]}, expected a {format_name}.")
    if found[1] > newest:
        raise ValueError(
            f"{path} has format version {found[1]}; this release reads up to {newest}. "
            "Upgrade lightning-merge: pip install -U lightning-merge."
        )
    return dict(value)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step, so that a kill between two renames cannot lose both.

    Returns:
        Whether the system can: Linux does, on its usual file systems.
    """
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(renameat2(here, os.fsencode(first), here, os.fsencode(second), swap) == 0)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _cannot_write(path: Path, error: OSError) -> OSError:
    return type(error)(
        error.errno or 0,
        f"cannot write {path}: {error.strerror or error}. Nothing was changed; free some space or "
        "check the permissions of its folder, and run again",
    )
