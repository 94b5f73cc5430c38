"""The eight-task benchmark with local data of the same schemas and a tower of the same kind."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as Picture

from lightning_merge.cli import _joined

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "clip_vit_b32"
SIDE = 32
# Name on the hub, its configuration, classes, and splits beside 'train' and 'test'.
SCHEMAS = {
    "sun397": ("tanganke/sun397", None, 397, ()),
    "cars": ("tanganke/stanford_cars", None, 196, ("contrast",)),
    "resisc45": ("tanganke/resisc45", None, 45, ()),
    "eurosat": ("tanganke/eurosat", None, 10, ("contrast",)),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits", 10, ("extra",)),
    "gtsrb": ("tanganke/gtsrb", None, 43, ()),
    "mnist": ("ylecun/mnist", None, 10, ()),
    "dtd": ("tanganke/dtd", None, 47, ()),
}
CLASSES = 5
"""Most classes of a stand-in."""


def standin(path: Path, task: str, seed: int) -> None:
    """Write pictures with the columns and splits of one of the data sets; the colour is the class.

    MNIST is grey, as the real one is.
    """
    rng = np.random.default_rng(seed)
    _, _, classes, extra = SCHEMAS[task]
    count = min(classes, CLASSES)
    colours = rng.integers(0, 256, (count, 3))
    features = Features(
        {"image": Image(), "label": ClassLabel(names=[f"{task}_class_{i}" for i in range(count)])}
    )

    def rows(size: int) -> Dataset:
        labels = [i % count for i in range(size)]
        noise = rng.integers(-30, 30, (size, SIDE, SIDE, 3))
        pixels = np.clip(colours[labels][:, None, None] + noise, 0, 255).astype(np.uint8)
        pictures = [Picture.fromarray(x).convert("L" if task == "mnist" else "RGB") for x in pixels]
        return Dataset.from_dict({"image": pictures, "label": labels}, features=features)

    splits = {"train": rows(40), "test": rows(13), **{name: rows(3) for name in extra}}
    DatasetDict(splits).save_to_disk(path)


def config_of(*names: str) -> dict[str, Any]:
    """One or more of the benchmark's configs, the later ones on top."""
    joined: dict[str, Any] = {}
    for name in names:
        joined = _joined(joined, yaml.safe_load((FOLDER / name).read_text(encoding="utf-8")))
    return joined


def shrink(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same config on the stand-ins, with a tiny random tower, writing to a folder."""
    config = yaml.safe_load(
        yaml.safe_dump(config, sort_keys=False).replace("runs/clip_vit_b32", str(folder))
    )
    if "network" in config.get("model", {}).get("init_args", {}):
        config["model"]["init_args"]["network"]["init_args"] |= {
            "pretrained": False,
            "dim": 12,
            "model_args": {"img_size": SIDE, "patch_size": 16, "embed_dim": 24, "depth": 2}
            | {"num_heads": 2},
        }
    for task, spec in config.get("data", {}).get("init_args", {}).get("tasks", {}).items():
        options = spec["init_args"]
        options |= {"path": str(folder / "data" / task), "name": None}
        options |= {"validation_size": 4, "calibration_size": 12}
        transform = options["transform"]["init_args"]
        options["transform"] = {
            "class_path": "lightning_merge.data.TimmTransform",
            "init_args": {**transform, "input_size": [3, SIDE, SIDE]},
        }
    if "data" in config:
        config["data"].setdefault("init_args", {}).update(batch_size=8, num_workers=0)
    if "trainer" in config:
        config["trainer"] |= {"max_steps": 2, "accelerator": "cpu", "devices": 1}
        config["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
    if "sweep" in config:
        config["sweep"]["grid"] = {"pairwise": 0, "response": 0, "lattice": 0}
    return config
