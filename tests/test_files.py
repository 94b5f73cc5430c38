import json
import os
import resource

import pytest
import torch

from lightning_merge import files
from lightning_merge.states import LazyStateDict


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"x": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_folder_leaves_the_old_folder_and_no_rubbish(tmp_path):
    path = tmp_path / "model"
    with files.replacing_folder(path) as folder:
        (folder / "one").write_text("old")
    with pytest.raises(RuntimeError), files.replacing_folder(path) as folder:
        (folder / "one").write_text("new")
        raise RuntimeError
    assert (path / "one").read_text() == "old"
    with files.replacing_folder(path) as folder:
        (folder / "two").write_text("new")
    assert [entry.name for entry in path.iterdir()] == ["two"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_files_are_readable_by_others(tmp_path):
    mask = os.umask(0o022)
    try:
        files.write_json(tmp_path / "a.json", {})
    finally:
        os.umask(mask)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write .*file/a.json.*Nothing was changed"):
        files.write_json(tmp_path / "file" / "a.json", {})


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    files.write_tensors(path, {"a": torch.zeros(3)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # what the system lets us write
    try:
        with pytest.raises(OSError, match=r"cannot write .*a\.safetensors.*free some space"):
            files.write_tensors(path, {"a": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(LazyStateDict(path)["a"], torch.zeros(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "not a readable thing manifest"),
        ("[]", "not a readable thing manifest"),
        ('{"format": {"name": "other", "version": 1}}', "describes a other, expected a thing"),
        ('{"format": {"name": "thing", "version": 9}}', "version 9; this release reads up to 2"),
    ],
)
def test_manifests_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "m.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        files.read_json(path, "thing", 2)


def test_lists_of_numbers_stand_on_one_line(tmp_path):
    value = {"a": [1, -2.5e-9], "b": ["1", 2], "c": [], "d": [[0.5], {"e": "[\n1\n]"}]}
    files.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert '"a": [1, -2.5e-09]' in text
    assert json.loads(text) == value
