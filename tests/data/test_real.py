import datasets
import numpy as np
import pytest

from lightning_merge.data import ImageTask, PlainTransform, real


@pytest.mark.parametrize("make", [real.digits, real.textures])
def test_splits_share_no_image_and_repeat(make):
    splits = make(0)
    seen = [image.tobytes() for images, _ in splits.values() for image in np.unique(images, axis=0)]
    assert len(set(seen)) >= 0.99 * len(seen)  # a scan or an empty crop may come twice
    for name, (images, labels) in make(0).items():
        np.testing.assert_array_equal(images, splits[name][0])
        np.testing.assert_array_equal(labels, splits[name][1])
    other = make(1)
    assert any((other[name][0] != images).any() for name, (images, _) in splits.items())


def test_sizes():
    assert {n: len(y) for n, (_, y) in real.digits(0).items()} == {
        "train": 898,
        "validation": 180,
        "calibration": 360,
        "test": 359,
    }
    for images, labels in real.textures(0).values():
        counts = np.bincount(labels)
        assert len(counts) == len(real.PICTURES)
        assert counts.min() == counts.max()
        assert images.shape[1:] == (32, 32)


def test_mnist_is_light_on_dark_and_complete():
    splits = real.mnist(0)
    labels = np.concatenate([y for _, y in splits.values()])
    np.testing.assert_array_equal(np.bincount(labels), [500] * 10)
    images = splits["train"][0]
    assert images.shape == (2500, 28, 28)
    assert images[:, 0].max() < 50 < 200 < images.max()


def test_blocks_are_those_of_the_picture():
    picture = np.arange(100 * 150, dtype=np.int64).reshape(100, 150).astype(np.uint8)
    blocks = real.cut(picture)
    want = [
        picture[48 * r : 48 * (r + 1), 48 * c : 48 * (c + 1)] for r in range(2) for c in range(3)
    ]
    np.testing.assert_array_equal(blocks, np.stack(want))


def test_crops_of_different_splits_come_from_different_blocks(monkeypatch):
    """On pictures whose pixels name their block, no block is seen in two splits."""
    number = np.kron(np.arange(40).reshape(4, 10), np.ones((48, 48))).astype(np.uint8)
    monkeypatch.setattr(real, "_picture", lambda name: number)
    seen = {name: set(np.unique(images)) for name, (images, _) in real.textures(0).items()}
    for picture in range(len(real.PICTURES)):
        parts = {
            name: set(np.unique(images[labels == picture]))
            for name, (images, labels) in real.textures(0).items()
        }
        assert sum(map(len, parts.values())) == len(set().union(*parts.values()))
    assert seen["train"]


def test_a_folder_is_readable_and_written_once(tmp_path):
    images = np.arange(7 * 16, dtype=np.int64).reshape(7, 4, 4).astype(np.uint8)
    splits = real.share_out(np.repeat(images, 10, axis=0), np.arange(70) % 7, seed=0)
    real.save(splits, tmp_path / "deep" / "small")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["small"]
    data = datasets.load_from_disk(tmp_path / "deep" / "small")
    assert data["calibration"].column_names == ["image"]
    task = ImageTask(
        str(tmp_path / "deep" / "small"),
        PlainTransform(channels=1, mean=0.0, std=1.0),
        validation_split="validation",
        calibration_split="calibration",
    )
    assert task.num_classes == 7
    for split, name in ((task.train(), "train"), (task.test(), "test")):
        want, labels = splits[name]
        got = np.stack([np.round(x.numpy()[0] * 255) for x, _ in split])
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal([int(y) for _, y in split], labels)


def test_a_run_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        datasets.DatasetDict, "save_to_disk", lambda *a: (_ for _ in ()).throw(OSError("full"))
    )
    splits = real.share_out(np.zeros((10, 2, 2), dtype=np.uint8), np.arange(10), seed=0)
    with pytest.raises(OSError, match="full"):
        real.save(splits, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_left_alone(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(real, "save", lambda splits, path: made.append(path.name))
    for name in ("digits", "mnist", "textures"):
        monkeypatch.setattr(real, name, lambda seed: {})
    (tmp_path / "mnist").mkdir()
    real.build(tmp_path)
    assert made == ["digits", "textures"]
