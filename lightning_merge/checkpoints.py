"""Reading foreign checkpoints: tensors only, nothing is ever unpickled into a live object."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from lightning_merge.networks import clean_names
from lightning_merge.states import LazyStateDict, StateDict


class StandIn:
    """Inert object in the place of whatever a checkpoint holds beside plain data and tensors."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "StandIn":
        """Take any arguments and keep none."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None:
        """Drop a list item."""

    def extend(self, value: Any) -> None:
        """Drop list items."""


def read_checkpoint(path: str | Path, *, stand_ins: bool = False) -> StateDict:
    """Read the weights of a ``.safetensors``, ``.ckpt``, ``.pt`` or ``.pth`` file, or of a folder.

    A Lightning checkpoint gives its ``state_dict``; wrapper parts of names are dropped. A folder
    is one of Hugging Face's or timm's: ``model.safetensors``, its shards by their index, or else
    ``pytorch_model.bin``.

    Args:
        path: The file or folder.
        stand_ins: Replace objects that ``weights_only=True`` refuses by inert stand-ins, and read
            the tensors. Safe, as nothing of the file is run, but what the objects held is lost.

    Raises:
        ValueError: If the file is missing or damaged, needs unpickling, or holds no weights.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, stand_ins=stand_ins)
    if path.suffix == ".safetensors":
        return LazyStateDict(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: expected a checkpoint file.")
    names = _refused(path)
    if names and not stand_ins:
        raise ValueError(
            f"{path} needs unpickling of {', '.join(names[:5])}, which could run code; only "
            "tensors and plain data are read. Read it with read_checkpoint(path, stand_ins=True) "
            "of lightning_merge.checkpoints, which replaces these by inert objects and keeps the "
            "tensors, or save its state_dict alone as safetensors."
        )
    fakes: list[Any] = [
        (type(name.rpartition(".")[2], (StandIn,), {}), name) for name in names if "." in name
    ]
    try:
        with safe_globals(fakes):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors ({type(error).__name__}). It may be "
            "truncated, or hold a pickled object: save the module's state_dict instead."
        ) from error
    return clean_names(_weights(content, path))


def under_prefix(state: StateDict, names: list[str], source: str) -> tuple[str, StateDict]:
    """Find the prefix under which a state dict holds all of ``names``.

    Returns:
        The prefix (``""``, or one that ends in a dot; of several the shortest) and the tensors
        below it, without it.

    Raises:
        ValueError: If no prefix fits; the message lists what is missing under the best one, and
            the names at the top level.
    """
    anchor = names[0]
    prefixes = {name.removesuffix(anchor) for name in state if name.endswith(anchor)} | {""}
    prefixes = {prefix for prefix in prefixes if not prefix or prefix.endswith(".")}
    best = min(prefixes, key=lambda p: (-sum(p + name in state for name in names), len(p), p))
    if missing := [name for name in names if best + name not in state]:
        top = sorted({name.partition(".")[0] for name in state})
        more = f", … ({len(missing) - 5} more)" if len(missing) > 5 else ""
        raise ValueError(
            f"{source} does not hold the backbone: {len(missing)} of {len(names)} parameters are "
            f"missing: {', '.join(missing[:5])}{more}; at its top level: {', '.join(top[:8])}. "
            "Give a checkpoint of the same architecture, fine-tuned from this base."
        )
    return best, {name[len(best) :]: state[name] for name in state if name.startswith(best)}


WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")


def _read_folder(folder: Path, *, stand_ins: bool) -> StateDict:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return read_checkpoint(folder / name, stand_ins=stand_ins)
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            # Only names of files beside the index: it must not lead elsewhere.
            shards = [
                read_checkpoint(folder / Path(part).name, stand_ins=stand_ins) for part in parts
            ]
            return {key: shard[key] for shard in shards for key in shard}
    found = ", ".join(sorted(item.name for item in folder.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"{folder} holds none of {', '.join(WEIGHT_FILES)} (nor their shards), only {found}. Give "
        "a folder of save_pretrained or timm's save_for_hf, or the checkpoint file itself."
    )


def timm_model(folder: str | Path) -> dict[str, Any] | None:
    """How to build the network of a timm folder, ``{class_path, init_args}``; else ``None``."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
        name = config["architecture"]
    except (OSError, ValueError, KeyError):
        return None
    arguments = {"model_name": name, "pretrained": False, **config.get("model_args", {})}
    if "num_classes" in config:
        arguments["num_classes"] = config["num_classes"]
    return {"class_path": "timm.create_model", "init_args": arguments}


def _refused(path: Path) -> list[str]:
    try:
        return sorted(get_unsafe_globals_in_checkpoint(path))
    except ValueError:  # a file of before torch 1.6: torch.load decides
        return []
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):  # damaged: as above
        return []


def _weights(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    weights = (
        {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not weights:
        raise ValueError(
            f"{path} holds no state dict of tensors. Save the module's state_dict, not the module."
        )
    return weights
