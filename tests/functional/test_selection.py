import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_merge.functional import selection
from lightning_merge.functional.selection import largest, num_kept


def kept_mask(values, cut, chunks):
    """The entries that a cut keeps, as a user of it must apply it."""
    masks = []
    for chunk, ties in zip(np.split(values, chunks), cut.ties, strict=True):
        mask = np.abs(chunk) > cut.threshold
        mask[np.flatnonzero(np.abs(chunk) == cut.threshold)[:ties]] = True
        masks.append(mask)
    return np.concatenate(masks)


def reference_mask(values, kept):
    """Largest magnitudes first, the lower index first among equals."""
    mask = np.zeros(len(values), bool)
    mask[np.argsort(-np.abs(values), kind="stable")[:kept]] = True
    return mask


@given(
    values=st.lists(st.integers(-4, 4), min_size=1, max_size=60),
    share=st.floats(0, 1),
    splits=st.lists(st.integers(0, 60), max_size=4),
    sample=st.sampled_from([1, 3, 1 << 18]),
)
def test_exact_with_ties_for_every_sample_size(values, share, splits, sample):
    values = np.array(values, np.float32)
    kept = round(share * len(values))
    chunks = sorted(min(split, len(values)) for split in splits)
    parts = [torch.tensor(part) for part in np.split(values, chunks)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "SMALL", sample)
        patch.setattr(selection, "BLOCK", 7)
        cut = largest(lambda: parts, len(values), kept)
    np.testing.assert_array_equal(kept_mask(values, cut, chunks), reference_mask(values, kept))


@pytest.mark.parametrize("order", ["random", "sorted", "reversed"])
def test_exact_where_the_sample_misleads(order, monkeypatch):
    monkeypatch.setattr(selection, "SMALL", 50)
    values = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    # every hundredth entry is sampled: make those small, so that the bracket misses
    values[::100] *= 1e-3
    if order != "random":
        values = np.sort(values)[:: 1 if order == "sorted" else -1].copy()
    for kept in (1, 700, 4999, 5000):
        cut = largest(lambda: [torch.tensor(values)], 5000, kept)
        np.testing.assert_array_equal(kept_mask(values, cut, []), reference_mask(values, kept))


def test_mostly_zeros_are_not_collected(monkeypatch):
    seen = []
    around = selection._around

    def spy(*args):
        seen.append(around(*args))
        return seen[-1]

    monkeypatch.setattr(selection, "_around", spy)
    values = torch.zeros(10_000)
    values[:100] = 1.0
    cut = largest(lambda: [values], 10_000, 2000)
    assert (cut.threshold, cut.ties) == (0.0, (1900,))
    assert seen
    assert sum(len(one.inside) for one in seen) == 0


@pytest.mark.parametrize("kept", [-1, 4])
def test_kept_out_of_range(kept):
    with pytest.raises(ValueError, match=r"kept must lie in \[0, 3\]"):
        largest(lambda: [torch.zeros(3)], 3, kept)


@given(density=st.floats(0.001, 1), size=st.integers(0, 500))
def test_num_kept(density, size):
    kept = num_kept(density, size)
    assert (kept == 0) == (size == 0)
    assert size == 0 or abs(kept - density * size) <= 1
    assert num_kept(1.0, size) == size


@pytest.mark.parametrize("order", [1, -1])
def test_chunks_of_two_dtypes_are_compared_in_the_wider_one(order):
    # in float32 the two largest would be one
    wide = torch.tensor([1.0, 1.0 + 1e-12, 1.0 + 2e-12, 0.0], dtype=torch.float64)
    chunks = [wide, torch.tensor([0.5, 1.0])][::order]
    cut = largest(lambda: chunks, 6, 1)
    assert cut.threshold == 1.0 + 2e-12
    assert sum(cut.ties) == 1
