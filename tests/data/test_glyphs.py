import numpy as np
import pytest
import torch

from lightning_merge.data import GlyphTask
from lightning_merge.data import glyphs as module
from lightning_merge.data.alphabets import ALPHABETS

SMALL = {"train_size": 33, "val_size": 17, "test_size": 16, "calibration_size": 21}


def test_alphabets_are_disjoint_from_the_base_and_have_the_promised_sizes():
    tasks = [a for name, a in ALPHABETS.items() if name != "base"]
    assert [len(set(a)) for a in tasks] == [16] * 8
    assert len(set(ALPHABETS["base"])) == len(ALPHABETS["base"]) == 192
    assert len(set("".join(tasks))) == 8 * 16
    blocks = {ord(c) >> 8 for a in tasks for c in a}
    assert not set(ALPHABETS["base"]) & set("".join(tasks))
    assert blocks  # the base stands in other Unicode blocks, some of them in the same page
    assert not [c for c in ALPHABETS["base"] if c in "abcdefghijklmnopqrstuvwxyz"]


def test_splits_have_their_sizes_shapes_and_even_labels():
    task = GlyphTask("hebrew", **SMALL)
    for split, size in ((task.train(), 33), (task.validation(), 17), (task.test(), 16)):
        assert len(split) == size
        image, label = split[0]
        assert image.shape == (1, 32, 32)
        assert image.dtype == torch.float32
        assert label.dtype == torch.int64
        counts = np.bincount([int(label) for _, label in split], minlength=task.num_classes)
        assert counts.max() - counts.min() <= 1
    image = task.calibration()[0]
    assert isinstance(image, torch.Tensor)
    assert image.shape == (1, 32, 32)
    assert -1 <= image.min() < 0
    assert image.max() <= 1


def test_splits_tasks_and_seeds_differ_and_equal_arguments_agree():
    one = GlyphTask("arabic", **SMALL)
    module._draw.cache_clear()
    again = GlyphTask("arabic", **SMALL)
    assert torch.equal(one.train().images, again.train().images)
    others = [
        one.test(),
        one.calibration(),
        GlyphTask("arabic", **SMALL, seed=1).train(),
        GlyphTask("math", **SMALL).train(),
        GlyphTask("arabic", **SMALL, strength=0.5).train(),
    ]
    for other in others:
        assert not torch.equal(one.train().images[:16], other.images[:16])


def test_the_global_seed_does_not_matter():
    images = []
    for seed in (1, 2):
        module._draw.cache_clear()
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - that it has no effect is the point
        images.append(GlyphTask("latin", **SMALL).train().images)
    assert torch.equal(*images)


def test_calibration_never_reads_labels(monkeypatch):
    class Poisoned(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *_args, **_kwargs):
            raise AssertionError("a label was read")

    task = GlyphTask("latin", **SMALL)
    honest = task.calibration().images
    drawn = module._draw
    monkeypatch.setattr(module, "_draw", lambda *a: (drawn(*a)[0], Poisoned(21)))
    calibration = task.calibration()
    assert torch.equal(torch.stack([calibration[i] for i in range(21)]), honest / 127.5 - 1)
    with pytest.raises(AssertionError, match="a label was read"):
        task.train()[0]


def test_nothing_is_drawn_until_a_split_is_asked_for(monkeypatch):
    monkeypatch.setattr(module, "draw_images", lambda *a: pytest.fail("drawn too early"))
    task = GlyphTask("base", train_size=10**9)
    task.prepare()
    assert task.num_classes == 192


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"script": "runes"}, "script.*'?runes'?"),
        ({"script": "latin", "val_size": 0}, "at least 1, got validation 0"),
        ({"script": "latin", "strength": -1.0}, r"strength must be in \[0, 1.5\], got -1.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):  # types are checked in tests
        GlyphTask(**arguments)
