import json

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from jsonargparse import ArgumentParser
from PIL import Image

from lightning_merge.data import ImageTask, PlainTransform, Task, TaskSuite

GREY = PlainTransform(channels=1, mean=0.0, std=1.0)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def images(count, start=0):
    """Images that are told apart by their grey value."""
    return [Image.new("L", (4, 4), start + i) for i in range(count)]


def rows(count, start=0, names=("cat", "dog", "emu")):
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=list(names))})
    labels = [i % len(names) for i in range(count)]
    return Dataset.from_dict({"image": images(count, start), "label": labels}, features=features)


def greys(split):
    return [round(float((x[0] if isinstance(x, tuple) else x).mean() * 255)) for x in split]


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    DatasetDict(train=rows(40), test=rows(9, 100), extra=rows(5, 200)).save_to_disk(path)
    return str(path)


def test_what_is_held_out_is_disjoint_complete_and_the_same_each_time(disk):
    def splits(seed=0):
        task = ImageTask(disk, GREY, validation_size=7, calibration_size=0.25, seed=seed)
        return [greys(s) for s in (task.train(), task.validation(), task.calibration())]

    train, validation, calibration = splits()
    assert (len(train), len(validation), len(calibration)) == (23, 7, 10)
    assert sorted(train + validation + calibration) == list(range(40))
    assert splits() == [train, validation, calibration]
    assert splits(seed=1) != [train, validation, calibration]


def test_items_are_inputs_and_labels(disk):
    task = ImageTask(disk, GREY)
    assert task.num_classes == 3
    assert greys(task.test()) == list(range(100, 109))
    inputs, label = task.test()[4]
    assert inputs.shape == (1, 4, 4)
    assert label.dtype == torch.int64
    assert int(label) == 1


def test_named_splits_and_slices_work_on_files_too(disk):
    task = ImageTask(
        disk,
        GREY,
        train_split="train[:50%]",
        validation_split="train[50%:60%]",
        test_split="test[-3:]+extra",
        calibration_split="extra",
    )
    assert greys(task.train()) == list(range(20))
    assert greys(task.validation()) == list(range(20, 24))
    assert greys(task.test()) == [106, 107, 108, 200, 201, 202, 203, 204]
    assert greys(task.calibration()) == [200, 201, 202, 203, 204]


def test_calibration_never_reads_labels(tmp_path):
    """Other labels, or none at all, leave the calibration inputs as they are."""
    honest, poisoned = rows(40), rows(40).cast_column("label", datasets.Value("int64"))
    poisoned = poisoned.map(lambda _: {"label": None}, load_from_cache_file=False)
    data = {"honest": honest, "poisoned": poisoned, "none": honest.remove_columns("label")}
    calibration = {}
    for name, train in data.items():
        DatasetDict(train=train, test=rows(3)).save_to_disk(tmp_path / name)
        calibration[name] = ImageTask(str(tmp_path / name), GREY).calibration()
        assert calibration[name].data.column_names == ["image"]
    assert all(isinstance(x, torch.Tensor) for x in calibration["honest"])
    assert greys(calibration["honest"]) == greys(calibration["poisoned"])
    assert greys(calibration["honest"]) == greys(calibration["none"])


def test_an_image_folder(tmp_path):
    for split, start in (("train", 0), ("test", 100)):
        for position, image in enumerate(images(12, start)):
            place = tmp_path / "folder" / split / f"class{position % 2}"
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{position:02}.png")
    task = ImageTask(str(tmp_path / "folder"), GREY)
    assert task.num_classes == 2
    assert sorted(greys(task.test())) == list(range(100, 112))
    assert {(g % 2, int(y)) for g, (_, y) in zip(greys(task.test()), task.test(), strict=True)} == {
        (0, 0),
        (1, 1),
    }


@pytest.mark.parametrize("folder", [True, False])
def test_parquet(tmp_path, folder):
    encoded = rows(20).map(lambda row: row)  # the bytes, not paths
    path = tmp_path / "train-00000.parquet"
    encoded.to_parquet(path)
    if folder:
        rows(6, 50).to_parquet(tmp_path / "test-00000.parquet")
    task = ImageTask(
        str(tmp_path if folder else path), GREY, test_split="test" if folder else "train[:6]"
    )
    assert greys(task.test()) == list(range(50, 56) if folder else range(6))
    assert task.num_classes == 3


def test_integers_and_strings_as_labels(tmp_path):
    numbers = Dataset.from_dict({"x": images(12), "y": [i % 4 for i in range(12)]})
    words = Dataset.from_dict({"x": images(12), "y": ["dog", "cat", "dog"] * 4})
    strange = Dataset.from_dict({"x": images(2), "y": ["dog", "emu"]})
    DatasetDict(train=numbers, test=numbers).save_to_disk(tmp_path / "numbers")
    DatasetDict(train=words, test=words, odd=strange).save_to_disk(tmp_path / "words")
    options = {"image": "x", "label": "y"}
    assert ImageTask(str(tmp_path / "numbers"), GREY, **options).num_classes == 4
    assert ImageTask(str(tmp_path / "numbers"), GREY, num_classes=9, **options).num_classes == 9
    task = ImageTask(str(tmp_path / "words"), GREY, **options)
    assert task.num_classes == 2
    assert [int(y) for _, y in task.test()][:3] == [1, 0, 1]
    odd = ImageTask(str(tmp_path / "words"), GREY, test_split="odd", **options).test()
    with pytest.raises(ValueError, match="label 'emu' is not among the 2 labels"):
        odd[1]


def test_training_can_have_a_transform_of_its_own(disk):
    task = ImageTask(disk, GREY, train_transform=PlainTransform(size=2, channels=1))
    assert task.train()[0][0].shape == (1, 2, 2)
    assert task.validation()[0][0].shape == (1, 4, 4)


def test_nothing_is_read_before_it_is_needed():
    ImageTask("/nowhere", GREY)


def test_errors_name_what_is_there(disk, tmp_path):
    with pytest.raises(ValueError, match="has no column 'img'; it has image, label"):
        ImageTask(disk, GREY, image="img").test()
    with pytest.raises(ValueError, match="has no column 'class'; it has image, label"):
        ImageTask(disk, GREY, label="class").test()
    with pytest.raises(ValueError, match=r"no split 'dev' .* It has train \(40\), test \(9\)"):
        ImageTask(disk, GREY, validation_split="dev").validation()
    with pytest.raises(ValueError, match=r"the split 'test\[:0\]' of .* is empty"):
        ImageTask(disk, GREY, test_split="test[:0]").test()
    with pytest.raises(ValueError, match=r"has 40 images, too few to hold out 38 .* and 4 for cal"):
        ImageTask(disk, GREY, validation_size=38).train()
    with pytest.raises(ValueError, match=r"expected a fraction .*, got calibration_size 1.5"):
        ImageTask(disk, GREY, calibration_size=1.5)
    with pytest.raises(ValueError, match=r"column 'label' .* holds no images"):
        ImageTask(disk, GREY, image="label").calibration()
    with pytest.raises(ValueError, match="/nowhere/data does not exist"):
        ImageTask("/nowhere/data", GREY).prepare()
    with pytest.raises(ValueError, match=r"does not exist \(kind 'folder'\)"):
        ImageTask("/nowhere/data", GREY, kind="folder").prepare()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"is a file, but no \.parquet file"):
        ImageTask(str(tmp_path / "notes.txt"), GREY).prepare()
    (tmp_path / "bad.parquet").write_text("x")
    with pytest.raises(ValueError, match=r"cannot read .*bad\.parquet as 'parquet' data"):
        ImageTask(str(tmp_path / "bad.parquet"), GREY).prepare()


def test_a_hub_name_without_a_network():
    with pytest.raises(ValueError, match="cannot load 'nobody/nothing' from the Hugging Face Hub"):
        ImageTask("nobody/nothing", GREY).prepare()


def test_from_a_config(disk):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "task")
    config = {
        "class_path": "ImageTask",
        "init_args": {
            "path": disk,
            "validation_size": 5,
            "transform": {
                "class_path": "lightning_merge.data.PlainTransform",
                "init_args": {"channels": 1},
            },
            "train_transform": {
                "class_path": "lightning_merge.data.TimmTransform",
                "init_args": {"model": "resnet18", "input_size": [1, 8, 8]},
            },
        },
    }
    task = parser.instantiate(parser.parse_args([f"--task={json.dumps(config)}"])).task
    suite = TaskSuite({"animals": task}, batch_size=4)
    inputs, labels = next(iter(suite.train_dataloader()))
    assert inputs.shape == (4, 1, 8, 8)
    assert labels.shape == (4,)
    assert next(iter(suite.predict_dataloader())).shape == (4, 1, 4, 4)
    assert torch.isfinite(inputs).all()
