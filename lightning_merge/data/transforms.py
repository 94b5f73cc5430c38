"""From a picture to the tensor that a network expects."""

from typing import Any, Literal, final

import numpy as np
import torch
from PIL import Image
from timm import get_pretrained_cfg
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor


@final
class PlainTransform:
    """Scale to a square, to grey or RGB, and standardize.

    Args:
        size: Side in pixels; None keeps the size, and then all pictures must have the same.
        channels: 1 for grey, 3 for RGB.
        mean: Subtracted from values in [0, 1]: one number, or one a channel.
        std: Divided by after that. The defaults give values from -1 to 1.
    """

    def __init__(
        self,
        size: int | None = None,
        channels: Literal[1, 3] = 3,
        mean: float | list[float] = 0.5,
        std: float | list[float] = 0.5,
    ) -> None:
        if size is not None and size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}.")
        self.size = size
        self.mode = "L" if channels == 1 else "RGB"
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        wrong = [len(v) for v in (self.mean, self.std) if len(v) not in (1, channels)]
        if wrong or not bool((self.std > 0).all()):
            raise ValueError(
                f"mean and std must be one number or {channels} (one a channel), std positive; "
                f"got {mean} and {std}."
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """The picture as float32, ``(channels, height, width)``."""
        image = image.convert(self.mode)
        if self.size is not None:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        values = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
        values = values.unsqueeze(0) if values.ndim == 2 else values.permute(2, 0, 1)
        return (values - self.mean) / self.std


@final
class TimmTransform:
    """The preprocessing that a timm model was trained with: size, crop, mean, std, channels.

    Args:
        model: Name of the timm model.
        input_size: Channels, height and width in place of the model's own; 1 channel gives grey.
        augment: Whether to augment at random, as for training.
        crop: Share of the shorter side that the central crop keeps, in place of the model's own;
            1 is what CLIP was trained with.

    Raises:
        ValueError: If timm has no data config of that name.
    """

    def __init__(
        self,
        model: str,
        input_size: tuple[int, int, int] | None = None,
        augment: bool = False,
        crop: float | None = None,
    ) -> None:
        if crop is not None and not 0 < crop <= 1:
            raise ValueError(f"crop is a share of the shorter side, in (0, 1], got {crop}.")
        config = get_pretrained_cfg(model)
        if config is None:
            raise ValueError(
                f"timm has no data config for '{model}'. Check the name with timm.list_models(), "
                "or use PlainTransform."
            )
        own: dict[str, Any] = config.to_dict()
        if input_size is not None:
            own |= {"input_size": input_size, "fixed_input_size": False}
        if crop is not None:
            own["crop_pct"] = crop
        channels = own["input_size"][0]
        for name in ("mean", "std"):
            if len(own[name]) != channels:  # one grey channel: the mean over the colours
                own[name] = (sum(own[name]) / len(own[name]),) * channels
        self.mode = "L" if channels == 1 else "RGB"
        self.config = resolve_data_config(pretrained_cfg=own)
        self._transform = create_transform(**self.config, is_training=augment)

    def __call__(self, image: Image.Image) -> Tensor:
        """The picture as float32, ``(channels, height, width)``."""
        return self._transform(image.convert(self.mode))
