"""Drawing characters: ink masks from the fonts that matplotlib ships, and their augmentation."""

from functools import lru_cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, max_pool2d

CANVAS = 64
"""Side of an ink mask in pixels: twice the side of an image, which keeps thin strokes clean."""

SIDE = 32
"""Side of an image in pixels."""

FONTS = tuple(
    f"DejaVu{face}.ttf"
    for face in (
        "Sans",
        "Sans-Bold",
        "Sans-Oblique",
        "Sans-BoldOblique",
        "SansMono",
        "SansMono-Bold",
        "Serif",
        "Serif-Bold",
        "Serif-Italic",
        "Serif-BoldItalic",
    )
)
"""Font files in matplotlib's own folder."""

_CHUNK = 1024  # images drawn at a time: bounds the working memory to about 100 MB


@lru_cache(maxsize=16)
def ink_masks(characters: str) -> list[UInt8[Tensor, "fonts strokes=3 canvas canvas"]]:
    """Each character in every font that has it, with thin, plain and thick strokes, centred.

    Args:
        characters: The characters, without spaces.

    Returns:
        One tensor a character, values 0 (paper) to 255 (ink). The number of fonts differs: few
        have Hebrew or Tifinagh.

    Raises:
        ValueError: If no font has one of the characters.
    """
    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    fonts = [(_code_points(folder / name), folder / name) for name in FONTS]
    masks = [
        [_centred_ink(character, path) for points, path in fonts if ord(character) in points]
        for character in characters
    ]
    missing = [c for c, drawn in zip(characters, masks, strict=True) if not drawn]
    if missing:
        raise ValueError(
            f"no DejaVu font of matplotlib has {', '.join(map(repr, missing[:5]))} "
            f"({len(missing)} of {len(characters)} characters). Choose other characters."
        )
    return [_with_strokes(torch.from_numpy(np.stack(drawn))) for drawn in masks]


def draw_images(
    labels: np.ndarray, characters: str, strength: float, rng: np.random.Generator
) -> UInt8[Tensor, "images 1 side side"]:
    """Draw each label's character in a random font and augment it.

    Every random number comes from ``rng``, in one order, and the arithmetic treats every image by
    itself; so the images depend neither on the number of threads nor on the global seeds.

    Args:
        labels: Positions in ``characters``, ``(images,)``.
        characters: The alphabet.
        strength: Scale of all augmentation; 0 draws plain centred characters.
        rng: Source of randomness.

    Returns:
        Grey images, 0 (paper) to 255 (ink).
    """
    masks = ink_masks(characters)
    first = np.cumsum([0] + [len(mask) for mask in masks])
    fonts = (rng.random(len(labels)) * np.diff(first)[labels]).astype(np.int64)
    chosen = torch.from_numpy(first[labels] + fonts).split(_CHUNK)
    drawn = torch.cat(masks)
    return torch.cat([_augment(drawn[indices], strength, rng) for indices in chosen])


def _augment(
    ink: UInt8[Tensor, "images 3 canvas canvas"], strength: float, rng: np.random.Generator
) -> UInt8[Tensor, "images 1 side side"]:
    def between(low: float, high: float) -> Float[Tensor, "images 1 1 1"]:
        values = rng.uniform(low, high, len(ink)).astype(np.float32)
        return torch.from_numpy(values).view(-1, 1, 1, 1)

    images = _warp(
        _choose_stroke(ink, strength * between(-0.4, 0.6)),
        angle=strength * between(-0.2, 0.2),
        zoom=torch.exp(strength * between(-0.15, 0.12)),
        shear=strength * between(-0.18, 0.18),
        shift=strength * torch.cat([between(-0.12, 0.12), between(-0.12, 0.12)], dim=1),
    )
    images = torch.lerp(images, _blur(images), (strength * between(0.0, 0.6)).clamp(max=1))
    contrast = 1 - strength * between(0.0, 0.35)
    paper = strength * between(0.0, 0.18)
    noise = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
    images = paper + contrast * images * (1 - paper) + strength * between(0.01, 0.09) * noise
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def _choose_stroke(
    ink: UInt8[Tensor, "images 3 canvas canvas"], amount: Float[Tensor, "images 1 1 1"]
) -> Float[Tensor, "images 1 canvas canvas"]:
    """Blend the plain strokes with the thick ones (amount 1) or the thin ones (-1)."""
    other = torch.where(amount[:, 0] > 0, ink[:, 2], ink[:, 0])
    blended = torch.lerp(ink[:, 1].float(), other.float(), amount[:, 0].abs().clamp(max=1))
    return blended.unsqueeze(1) / 255


def _warp(
    images: Float[Tensor, "images 1 canvas canvas"],
    *,
    angle: Float[Tensor, "images 1 1 1"],
    zoom: Float[Tensor, "images 1 1 1"],
    shear: Float[Tensor, "images 1 1 1"],
    shift: Float[Tensor, "images 2 1 1"],
) -> Float[Tensor, "images 1 side side"]:
    """Rotate (radians), zoom, shear and shift (fractions of the side, x and y)."""
    axis = (2 * torch.arange(SIDE) + 1) / SIDE - 1
    x = axis.view(1, 1, 1, -1) - 2 * shift[:, :1]
    y = axis.view(1, 1, -1, 1) - 2 * shift[:, 1:]
    source_x = (angle.cos() * x + angle.sin() * y) / zoom
    source_y = (-angle.sin() * x + angle.cos() * y) / zoom
    grid = torch.cat([source_x + shear * source_y, source_y], dim=1).permute(0, 2, 3, 1)
    return grid_sample(images, grid, align_corners=False)


def _blur(
    images: Float[Tensor, "images 1 side side"],
) -> Float[Tensor, "images 1 side side"]:
    """Binomial blur over five pixels: two passes of the mean over three."""
    for _ in range(2):
        images = avg_pool2d(images, 3, stride=1, padding=1)
    return images


def _with_strokes(
    ink: UInt8[Tensor, "fonts canvas canvas"],
) -> UInt8[Tensor, "fonts strokes=3 canvas canvas"]:
    """Thinner and thicker by a pixel on each side, then softened for sampling every second one."""
    plain = ink.float().unsqueeze(1)
    thick = max_pool2d(plain, 3, stride=1, padding=1)
    thin = -max_pool2d(-plain, 3, stride=1, padding=1)
    strokes = avg_pool2d(torch.cat([thin, plain, thick], dim=1), 3, stride=1, padding=1)
    return strokes.round().to(torch.uint8)


def _code_points(path: Path) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(path)).get_charmap())


def _centred_ink(character: str, path: Path) -> UInt8[np.ndarray, "canvas canvas"]:
    size, room = 46, CANVAS - 4
    while True:
        font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
        left, top, right, bottom = font.getbbox(character)
        if max(right - left, bottom - top) <= room:
            break
        size -= 2
    image = Image.new("L", (CANVAS, CANVAS))
    corner = (CANVAS - (right - left)) / 2 - left, (CANVAS - (bottom - top)) / 2 - top
    ImageDraw.Draw(image).text((int(corner[0]), int(corner[1])), character, fill=255, font=font)
    return np.asarray(image)
