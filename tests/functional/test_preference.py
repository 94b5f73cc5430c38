import math

import pytest
import torch

from lightning_merge.functional.preference import as_preference, as_preferences

TASKS = ["a", "b", "c"]


def test_mapping_fills_missing_tasks_with_zero_and_normalises() -> None:
    p = as_preference({"c": 3, "a": 1}, TASKS)
    assert p.dtype == torch.float64
    assert p.tolist() == [0.25, 0.0, 0.75]


def test_sequences_and_tensors_agree() -> None:
    p = as_preference([1, 2, 5], TASKS)
    assert torch.equal(p, as_preference(torch.tensor([1.0, 2.0, 5.0]), TASKS))
    assert torch.equal(p, as_preference(torch.tensor([1, 2, 5]), TASKS))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1])
def test_bad_entry_is_named(bad: float) -> None:
    with pytest.raises(ValueError, match="task 'b'"):
        as_preference({"a": 1.0, "b": bad}, TASKS)


def test_all_zero_length_and_shape() -> None:
    with pytest.raises(ValueError, match="every weight"):
        as_preference({"a": 0.0}, TASKS)
    with pytest.raises(ValueError, match="2 weights for the 3 tasks"):
        as_preference([0.5, 0.5], TASKS)
    with pytest.raises(ValueError, match="shape"):
        as_preference(torch.ones(1, 3), TASKS)
    with pytest.raises(ValueError, match="shape"):
        as_preferences(torch.ones(3), TASKS)
    with pytest.raises(ValueError, match="no preference"):
        as_preferences([], TASKS)


def test_overflowing_sum() -> None:
    with pytest.raises((ValueError, OverflowError)):
        as_preference([1e308, 1e308, 1e308], TASKS)


def test_unknown_task_lists_the_known() -> None:
    with pytest.raises(KeyError, match=r"'d'.*'a', 'b', 'c'"):
        as_preference({"a": 1.0, "d": 1.0}, TASKS)


def test_strict_warns_or_raises_on_the_sum() -> None:
    with pytest.warns(UserWarning, match="sums to 2"):
        as_preference([1, 1, 0], TASKS, strict=True)
    with pytest.raises(ValueError, match="sums to 2"):
        as_preference([1, 1, 0], TASKS, strict="error")
    as_preference([0.5, 0.5 + 1e-8, 0], TASKS, strict="error")


def test_many_name_the_row() -> None:
    assert as_preferences([{"a": 1.0}, [0, 1, 1]], TASKS).tolist() == [[1, 0, 0], [0, 0.5, 0.5]]
    with pytest.raises(ValueError, match=r"preference 1: .*task 'a'"):
        as_preferences(torch.tensor([[1.0, 0, 0], [-1.0, 0, 2]]), TASKS)
