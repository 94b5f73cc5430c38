"""The folder of a merged model: its files, its manifest and its model card."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_merge.backbones import write_backbone
from lightning_merge.card import model_card
from lightning_merge.files import (
    read_data,
    read_json,
    replacing,
    replacing_folder,
    write_json,
    write_tensors,
)
from lightning_merge.states import LazyStateDict, StateDict, tied_names

FORMAT = "merged model"
VERSION = 1
MANIFEST, CARD = "merged.json", "README.md"
HEADS, CORRECTION = "heads.safetensors", "correction.safetensors"


def write_merged(
    path: str | Path,
    manifest: Mapping[str, Any],
    backbone: StateDict,
    parts: Mapping[str, Mapping[str, StateDict]],
    *,
    shard_size: int,
    pictures: Mapping[str, bytes],
    files: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write the folder in one step: an older one stays until the new one is whole.

    Args:
        path: The folder.
        manifest: What ``merged.json`` holds, beside its format and the names of ``files``.
        backbone: The merged backbone; of names that share a tensor the first is written.
        parts: Tensors by file and task.
        shard_size: Bytes from which the backbone is written in several files.
        pictures: PNG files by name.
        files: What the method found, by name: plain data of a JSON file, or tensors.

    Raises:
        OSError: If the disk is full or the folder cannot be written to.
    """
    ties = tied_names(backbone)
    stamp = {"format": {"name": FORMAT, "version": VERSION}}
    manifest = {**stamp, **manifest, "files": list(files)}
    with replacing_folder(path) as folder:
        write_backbone(folder, {n: backbone[n] for n in backbone if n not in ties}, shard_size)
        for file, tasks in parts.items():
            tensors = {f"{task}/{n}": x for task, state in tasks.items() for n, x in state.items()}
            write_tensors(folder / file, tensors)
        for name, data in files.items():
            if name.endswith(".json"):
                write_json(folder / name, data)
            else:
                write_tensors(folder / name, data)
        for name, content in pictures.items():
            (folder / name).write_bytes(content)
        write_card(folder, manifest)
        write_json(folder / MANIFEST, manifest)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """What ``merged.json`` of a folder holds.

    Raises:
        ValueError: If the folder is no merged model, damaged, or of a newer format.
    """
    return read_json(Path(path) / MANIFEST, FORMAT, VERSION)


def read_files(path: Path, manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the method found, as :func:`write_merged` wrote it.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in manifest.get("files", ()):
        if name.endswith(".json"):
            found[name] = read_data(path / name)
        else:
            found[name] = dict(LazyStateDict(path / name))
    return found


def read_part(file: Path, tasks: list[str]) -> dict[str, dict[str, Tensor]]:
    """Tensors of a file by task, as :func:`write_merged` joined them."""
    state = LazyStateDict(file)
    found: dict[str, dict[str, Tensor]] = {task: {} for task in tasks}
    for key in state:
        task, _, name = key.partition("/")
        found[task][name] = state[key]
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that make a merged model."""
    return {name: importlib.metadata.version(name) for name in ("lightning-merge", "torch", "timm")}


def write_card(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the model card beside a manifest; it shows the pictures that lie there."""
    pictures = sorted(path.name for path in folder.glob("*.png"))
    with replacing(folder / CARD) as temporary:
        temporary.write_text(model_card(manifest, pictures), encoding="utf-8")


def record_scores(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Put the scores of a sweep into a merged model's manifest and card.

    Args:
        path: Its folder.
        summary: What ``summary.json`` holds.

    Raises:
        ValueError: If the folder is no merged model.
        OSError: If it cannot be written to.
    """
    manifest = read_manifest(path)
    scores = {name: summary[name] for name in ("tasks", "metric", "rows")}
    manifest["record"] = {**manifest["record"], "scores": scores}
    write_card(Path(path), manifest)
    write_json(Path(path) / MANIFEST, manifest)
