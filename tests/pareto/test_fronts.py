import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_merge.pareto import Hypervolume, hypervolume, pareto_mask
from lightning_merge.pareto.fronts import check_values

SEEDS = st.integers(0, 2**16)


def reference_mask(values):
    keep = []
    for mine in values:
        dominated = any(
            all(o >= m for o, m in zip(other, mine, strict=True))
            and any(o > m for o, m in zip(other, mine, strict=True))
            for other in values
        )
        keep.append(not dominated)
    return keep


def reference_volume(points, origin):
    """Inclusion and exclusion over all subsets of the boxes."""
    boxes = np.maximum(np.asarray(points) - origin, 0)
    total = 0.0
    for size in range(1, len(boxes) + 1):
        for subset in itertools.combinations(boxes, size):
            total += (-1) ** (size + 1) * np.prod(np.min(subset, axis=0))
    return total


def random_points(num_points, num_tasks, seed):
    return torch.rand(num_points, num_tasks, generator=torch.Generator().manual_seed(seed)).double()


@settings(deadline=None)
@given(st.integers(1, 25), st.integers(1, 6), SEEDS)
def test_pareto_mask_is_the_definition(num_points, num_tasks, seed):
    values = (random_points(num_points, num_tasks, seed) * 4).round()  # ties and copies
    assert pareto_mask(values).tolist() == reference_mask(values.tolist())
    assert pareto_mask(-values, maximize=False).tolist() == reference_mask(values.tolist())


def test_pareto_mask_in_chunks_is_the_same(monkeypatch):
    values = random_points(101, 4, 0)
    whole = pareto_mask(values)
    monkeypatch.setattr("lightning_merge.pareto.fronts._CHUNK", 1000)
    assert torch.equal(pareto_mask(values), whole)


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), SEEDS, st.floats(-0.5, 0.9))
def test_hypervolume_is_the_volume_of_the_union(num_points, num_tasks, seed, origin):
    values = random_points(num_points, num_tasks, seed)
    expected = reference_volume(values.numpy(), origin)
    found = hypervolume(values, origin)
    assert found.value == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert (found.method, found.error) == ("exact", 0.0)
    mirrored = hypervolume(1 - values, 1 - origin, maximize=False)
    assert mirrored.value == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(st.integers(1, 5), SEEDS)
def test_hypervolume_ignores_dominated_points_and_grows_with_others(num_tasks, seed):
    values = random_points(6, num_tasks, seed)
    volume = hypervolume(values).value
    worse = values * random_points(6, num_tasks, seed + 1)
    assert hypervolume(torch.cat([values, worse])).value == pytest.approx(volume, rel=1e-12)
    more = torch.cat([values, random_points(1, num_tasks, seed + 2)])
    assert hypervolume(more).value >= volume - 1e-12


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
def test_hypervolume_of_one_point_is_a_product(num_tasks):
    point = torch.full((3, num_tasks), 0.75)
    found = hypervolume(point, [0.25] * num_tasks)
    assert found.value == pytest.approx(0.5**num_tasks)
    assert (found.method, found.reference) == ("exact", (0.25,) * num_tasks)


def test_hypervolume_of_many_tasks_is_within_its_error_and_repeats_with_its_seed():
    values = random_points(6, 8, 0) * 0.5 + 0.5
    found = hypervolume(values, seed=5)
    expected = reference_volume(values.numpy(), 0.0)
    assert found.method == "monte-carlo"
    assert 0 < found.error < 0.01 * expected
    assert abs(found.value - expected) < 4 * found.error  # 4 standard errors: one seed in 16,000
    assert hypervolume(values, seed=5) == found
    assert hypervolume(values, seed=6).value != found.value


def test_metric_equals_the_function_over_all_batches():
    values = random_points(30, 3, 1)
    measure = Hypervolume(reference=[0.1, 0.0, 0.2])
    for batch in values.split(7):
        measure.update(batch.float())
    found = measure.compute()
    assert float(found["hypervolume"]) == pytest.approx(
        hypervolume(values, (0.1, 0.0, 0.2)).value, rel=1e-6
    )
    assert float(found["hypervolume_error"]) == 0


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_metric_without_values_says_so():
    with pytest.raises(ValueError, match=r"call update\(\) before compute\(\)"):
        Hypervolume().compute()


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"non-empty matrix \(points, tasks\), found shape \(3,\)"):
        check_values("values", torch.zeros(3))
    values = torch.zeros(2, 3)
    values[1, 2] = torch.nan
    for call in (pareto_mask, hypervolume, Hypervolume().update):
        with pytest.raises(ValueError, match="values holds a non-finite number at point 1, task 2"):
            call(values)
    with pytest.raises(ValueError, match="reference point has 2 numbers, expected 1 or 3"):
        hypervolume(torch.ones(1, 3), [0.0, 0.0])
