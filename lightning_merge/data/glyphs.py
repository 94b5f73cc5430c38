"""Glyphs: recognize characters of one writing system. Nothing is downloaded."""

import zlib
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_merge.data.alphabets import ALPHABETS
from lightning_merge.data.rendering import draw_images
from lightning_merge.data.task import Task

Script = Literal[
    "latin", "greek", "cyrillic", "armenian", "georgian", "hebrew", "arabic", "math", "base"
]

_SPLITS = ("train", "validation", "test", "calibration")


class GlyphTask(Task):
    """Characters of one script, 32x32 grey, rendered from matplotlib's fonts and augmented.

    Inputs are float32 of shape (1, 32, 32) from -1 (paper) to 1 (ink); labels are positions in the
    script's alphabet, as even as the size of the split allows. Equal arguments give equal images,
    whatever the machine's thread count or global seed. A split is drawn when first asked for.

    Args:
        script: Writing system: 16 classes each; 'base' has 192 characters of other Unicode blocks,
            to pre-train the base on.
        train_size: Images to fine-tune on.
        val_size: Images to choose a checkpoint on.
        test_size: Images to report on.
        calibration_size: Unlabeled images for statistics, a split of their own.
        seed: Seed of fonts and augmentation.
        strength: Scale of all augmentation (rotation, zoom, shear, shift, stroke, blur, contrast
            and noise); 0 gives plain centred characters.
    """

    def __init__(
        self,
        script: Script,
        train_size: int = 2000,
        val_size: int = 400,
        test_size: int = 800,
        calibration_size: int = 2000,
        seed: int = 0,
        strength: float = 1.0,
    ) -> None:
        if script not in ALPHABETS:
            raise ValueError(f"unknown script '{script}'; choose one of {', '.join(ALPHABETS)}.")
        self._sizes = dict(
            zip(_SPLITS, (train_size, val_size, test_size, calibration_size), strict=True)
        )
        small = [f"{split} {size}" for split, size in self._sizes.items() if size < 1]
        if small:
            raise ValueError(f"sizes of splits must be at least 1, got {', '.join(small)}.")
        if not 0 <= strength <= 1.5:
            raise ValueError(f"strength must be in [0, 1.5], got {strength}.")
        self.script = script
        self.seed = seed
        self.strength = strength

    @property
    def num_classes(self) -> int:
        """Characters of the script."""
        return len(ALPHABETS[self.script])

    def train(self) -> "GlyphImages":
        """Labelled images to fine-tune on."""
        return GlyphImages(*self._draw("train"))

    def validation(self) -> "GlyphImages":
        """Labelled images to choose a checkpoint on."""
        return GlyphImages(*self._draw("validation"))

    def test(self) -> "GlyphImages":
        """Labelled images to report on."""
        return GlyphImages(*self._draw("test"))

    def calibration(self) -> "GlyphImages":
        """Unlabeled images for statistics."""
        return GlyphImages(self._draw("calibration")[0])

    def _draw(self, split: str) -> tuple[Tensor, Tensor]:
        return _draw(self.script, split, self._sizes[split], self.seed, self.strength)


class GlyphImages(Dataset[Tensor | tuple[Tensor, Tensor]]):
    """Stored grey images as float inputs, with their labels where there are any.

    Args:
        images: uint8, ``(n, 1, 32, 32)``.
        labels: int64, ``(n,)``; None gives inputs alone.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, Tensor]:
        image = self.images[index].float().div_(127.5).sub_(1)
        return image if self.labels is None else (image, self.labels[index])


@lru_cache(maxsize=64)
def _draw(script: str, split: str, size: int, seed: int, strength: float) -> tuple[Tensor, Tensor]:
    """Images and labels of one split; cached, as fit, validation and test ask more than once."""
    characters = ALPHABETS[script]
    rng = np.random.default_rng([seed, zlib.crc32(script.encode()), _SPLITS.index(split)])
    labels = rng.permutation(np.arange(size) % len(characters))
    return draw_images(labels, characters, strength, rng), torch.from_numpy(labels)
