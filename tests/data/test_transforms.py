import numpy as np
import pytest
import torch
from PIL import Image

from lightning_merge.data import PlainTransform, TimmTransform


def picture(mode="RGB", size=(20, 10)):
    rng = np.random.default_rng(0)
    shape = (size[1], size[0]) + ((3,) if mode == "RGB" else ())
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def test_plain_values_against_numpy():
    image = picture()
    got = PlainTransform(mean=[0.1, 0.2, 0.3], std=2.0)(image)
    want = (np.asarray(image) / 255 - [0.1, 0.2, 0.3]) / 2
    np.testing.assert_allclose(got.numpy(), want.transpose(2, 0, 1), atol=1e-6)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_grey_and_colour_and_size(mode):
    assert PlainTransform(size=8, channels=1)(picture(mode)).shape == (1, 8, 8)
    assert PlainTransform(size=8, channels=3)(picture(mode)).shape == (3, 8, 8)
    assert PlainTransform()(picture(mode)).shape == (3, 10, 20)
    assert PlainTransform(channels=1)(Image.new("L", (2, 2), 255)).unique().tolist() == [1.0]
    assert PlainTransform(channels=1)(Image.new("L", (2, 2), 0)).unique().tolist() == [-1.0]


def test_timm_transform_is_that_of_the_model():
    assert TimmTransform("resnet18")(picture()).shape == (3, 224, 224)
    white = TimmTransform("resnet18")(Image.new("RGB", (50, 50), (255, 255, 255)))
    want = (1 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(white[:, 0, 0].numpy(), want, rtol=1e-5)


def test_timm_transform_in_grey_and_small():
    grey = TimmTransform("resnet18", input_size=(1, 32, 32))
    assert grey(picture()).shape == (1, 32, 32)
    assert grey.config["mean"] == pytest.approx((0.449,), abs=1e-6)


def test_augmentation_is_random():
    torch.manual_seed(0)
    import random

    random.seed(0)
    transform = TimmTransform("resnet18", input_size=(3, 16, 16), augment=True)
    image = picture(size=(64, 64))
    assert not torch.equal(transform(image), transform(image))


def test_bad_arguments():
    with pytest.raises(ValueError, match="timm has no data config for 'resnet19x'"):
        TimmTransform("resnet19x")
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        PlainTransform(size=0)
    with pytest.raises(ValueError, match=r"one number or 3 \(one a channel\)"):
        PlainTransform(mean=[0.5, 0.5])
    with pytest.raises(ValueError, match="std positive"):
        PlainTransform(std=0.0)


def test_the_crop_of_clip_keeps_the_whole_shorter_side():
    name = "vit_base_patch32_clip_quickgelu_224.openai"
    whole = TimmTransform(name, crop=1.0)
    # Dark but for a bright frame of four pixels, which any smaller crop loses.
    pixels = np.zeros((224, 224, 3), dtype=np.uint8)
    pixels[:4] = pixels[-4:] = pixels[:, :4] = pixels[:, -4:] = 255
    image = Image.fromarray(pixels)
    assert whole(image).shape == (3, 224, 224)
    assert whole(image)[0, 0].min() > 1
    assert TimmTransform(name)(image)[0, 0].max() < whole(image)[0, 0].min()
    with pytest.raises(ValueError, match=r"share of the shorter side, in \(0, 1\], got 1.5"):
        TimmTransform(name, crop=1.5)
