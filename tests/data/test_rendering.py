import numpy as np
import pytest
import torch

from lightning_merge.data.alphabets import ALPHABETS
from lightning_merge.data.rendering import CANVAS, SIDE, draw_images, ink_masks


@pytest.mark.parametrize("script", ALPHABETS)
def test_every_character_has_ink_in_at_least_two_fonts_and_is_drawn_whole(script):
    for character, masks in zip(ALPHABETS[script], ink_masks(ALPHABETS[script]), strict=True):
        assert len(masks) >= 2, character
        plain = masks[:, 1]
        assert (plain.amax((1, 2)) >= 180).all(), character
        border = torch.cat([plain[:, 0], plain[:, -1], plain[:, :, 0], plain[:, :, -1]], dim=1)
        assert (border == 0).all(), f"{character} is cut off"


def test_strokes_go_from_thin_to_thick():
    (masks,) = ink_masks("m")
    thin, plain, thick = masks.float().mean((0, 2, 3))
    assert thin < plain < thick


def test_a_character_that_no_font_has_is_named():
    with pytest.raises(ValueError, match=r"no DejaVu font of matplotlib has '龍' \(1 of 2"):
        ink_masks("a龍")


def test_without_augmentation_the_image_is_the_centred_character_at_half_size():
    rng = np.random.default_rng(0)
    image = draw_images(np.zeros(1, dtype=np.int64), "o", 0.0, rng)[0, 0].numpy()
    candidates = [mask[1].numpy() for mask in ink_masks("o")[0]]
    halves = [c.reshape(SIDE, 2, SIDE, 2).mean((1, 3)) for c in candidates]
    assert min(np.abs(half - image).max() for half in halves) <= 1  # rounding to bytes
    assert CANVAS == 2 * SIDE


def test_threads_do_not_change_images():
    labels = np.arange(40) % 16
    first = draw_images(labels, ALPHABETS["greek"], 1.0, np.random.default_rng(3))
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        again = draw_images(labels, ALPHABETS["greek"], 1.0, np.random.default_rng(3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first, again)


def test_no_label_draws_no_image():
    images = draw_images(np.zeros(0, dtype=np.int64), "ab", 1.0, np.random.default_rng(0))
    assert images.shape == (0, 1, SIDE, SIDE)
