import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_merge.pareto import (
    PreferenceAlignment,
    Uniformity,
    das_dennis,
    dirichlet,
    equal,
    one_hot,
    pairwise,
    uniformity,
)
from lightning_merge.pareto import agreement as agree

SEEDS = st.integers(0, 2**16)


def random_values(preferences, seed):
    return torch.rand(preferences.shape, generator=torch.Generator().manual_seed(seed)).double()


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 9), SEEDS)
def test_uniformity_is_the_formula(num_tasks, num_points, seed):
    preferences = dirichlet(num_tasks, num_points, seed=seed)
    losses = random_values(preferences, seed)
    for row, p, loss in zip(uniformity(preferences, losses), preferences, losses, strict=True):
        shares = [float(x) / float((p * loss).sum()) for x in p * loss]
        mu = sum(s * math.log(num_tasks * s) if s > 0 else 0.0 for s in shares)
        assert float(row) == pytest.approx(1 - mu, abs=1e-12)
        assert 1 - math.log(num_tasks) - 1e-12 <= float(row) <= 1 + 1e-12


@settings(deadline=None)
@given(st.integers(2, 8), SEEDS)
def test_uniformity_is_one_exactly_where_weighted_losses_are_equal(num_tasks, seed):
    preferences = dirichlet(num_tasks, 4, seed=seed, concentration=5.0)
    losses = 0.1 / preferences
    torch.testing.assert_close(uniformity(preferences, losses), torch.ones(4).double())
    losses[:, 0] *= 1.5
    assert bool((uniformity(preferences, losses) < 1 - 1e-6).all())


def test_uniformity_of_corners_and_of_no_loss():
    corners = one_hot(5)
    expected = torch.full((5,), 1 - math.log(5)).double()
    torch.testing.assert_close(uniformity(corners, random_values(corners, 0)), expected)
    torch.testing.assert_close(uniformity(equal(5), torch.zeros(1, 5)), torch.ones(1).double())
    with pytest.raises(ValueError, match="losses must not be negative"):
        uniformity(equal(2), torch.tensor([[-0.1, 0.2]]))


def test_uniformity_metric_averages_interior_preferences_over_batches():
    grid = torch.cat([one_hot(3), dirichlet(3, 20), equal(3)])
    values = random_values(grid, 3)
    measure = Uniformity()
    for p, v in zip(grid.split(7), values.split(7), strict=True):
        measure.update(p, v)
    expected = uniformity(grid[3:], 1 - values[3:]).mean()
    torch.testing.assert_close(measure.compute(), expected)
    assert (int(measure.num_interior), int(measure.num_boundary)) == (21, 3)
    losses = Uniformity(best=None)
    losses.update(grid, 1 - values)
    torch.testing.assert_close(losses.compute(), expected)


def reference_tau_b(x, y):
    """Kendall's τ-b by counting pairs."""
    concordant = ties_x = ties_y = pairs = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        a, b = x[i] - x[j], y[i] - y[j]
        pairs += 1
        ties_x += a == 0
        ties_y += b == 0
        concordant += (a * b > 0) - (a * b < 0)
    scale = math.sqrt((pairs - ties_x) * (pairs - ties_y))
    return concordant / scale if scale else float("nan")


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 4), SEEDS)
def test_kendall_tau_counts_pairs(num_tasks, divisions, seed):
    grid = das_dennis(num_tasks, divisions)
    values = (random_values(grid, seed) * 5).round()
    expected = [
        reference_tau_b(grid[:, t].tolist(), values[:, t].tolist()) for t in range(num_tasks)
    ]
    torch.testing.assert_close(
        agree.kendall_tau(grid, values), torch.tensor(expected).double(), equal_nan=True
    )


def test_monotonicity_violations_counts_falls_along_edges():
    grid = torch.cat([pairwise(3, 0, 1, 3), pairwise(3, 1, 2, 3)[1:], equal(3)])
    # edge 0-1: rows 0, 1, 2; edge 1-2: rows 2, 3, 4; edge 0-2: rows 0, 4
    values = grid.clone()
    assert float(agree.monotonicity_violations(grid, values)) == 0
    values[1, 1] = -0.2  # task 1 falls once as its weight rises from row 0 to 1 ...
    values[3, 1] = -0.2  # ... and on the other edge from row 4 to 3
    steps = 2 * (2 + 2 + 1)
    assert float(agree.monotonicity_violations(grid, values)) == pytest.approx(2 / steps)
    values[1, 1] = values[3, 1] = -0.0009  # within 0.1 points
    assert float(agree.monotonicity_violations(grid, values)) == 0


def test_monotonicity_sees_floored_edges_apart_and_knows_when_there_are_none():
    grid = torch.cat([pairwise(4, 0, 2, 3), pairwise(4, 0, 2, 3, floor=0.2)])
    values = grid.clone()
    values[3:] -= 0.5  # one edge lower than the other is no fall along either
    assert float(agree.monotonicity_violations(grid, values)) == 0
    values[4, 2] = -9
    assert float(agree.monotonicity_violations(grid, values)) == pytest.approx(1 / 8)
    lonely = dirichlet(5, 6)
    assert math.isnan(float(agree.monotonicity_violations(lonely, lonely)))


def test_edge_rows_are_sorted_along_the_edge():
    grid = torch.cat([equal(3), pairwise(3, 0, 2, 4).flip(0), one_hot(3, 1)])
    assert agree.edge_rows(grid, 0, 2).tolist() == [4, 3, 2, 1]


def test_control_range_and_cross_cost():
    grid = torch.cat([equal(3), one_hot(3)])
    values = torch.tensor([[0.8, 0.8, 0.8], [0.9, 0.6, 0.7], [0.5, 0.9, 0.8], [0.7, 0.7, 1.0]])
    torch.testing.assert_close(
        agree.control_range(grid, values), torch.tensor([0.4, 0.3, 0.3]).double()
    )
    torch.testing.assert_close(
        agree.cross_cost(grid, values), torch.tensor([0.15, 0.15, 0.1]).double()
    )
    assert agree.control_range(grid[:3], values[:3]).isnan().tolist() == [False, False, True]
    assert bool(agree.cross_cost(grid[1:], values[1:]).isnan().all())


def test_alignment_metric_equals_the_functions_over_all_batches():
    grid = das_dennis(3, 5)
    values = grid + 0.1 * random_values(grid, 0)
    measure, losses = PreferenceAlignment(), PreferenceAlignment(maximize=False)
    for p, v in zip(grid.split(4), values.split(4), strict=True):
        measure.update(p, v)
        losses.update(p, -v)
    expected = {
        "kendall_tau": agree.kendall_tau(grid, values),
        "monotonicity_violations": agree.monotonicity_violations(grid, values),
        "control_range": agree.control_range(grid, values),
        "cross_cost": agree.cross_cost(grid, values),
    }
    torch.testing.assert_close(measure.compute(), expected, equal_nan=True)
    torch.testing.assert_close(losses.compute(), expected, equal_nan=True)
    assert bool((expected["kendall_tau"] > 0.5).all())


def test_bad_pairs_are_named():
    with pytest.raises(
        ValueError, match=r"one shape \(points, tasks\), found \(1, 2\) and \(2, 2\)"
    ):
        agree.check_pair(equal(2), one_hot(2), "values")
    with pytest.raises(ValueError, match="preferences must not be negative"):
        PreferenceAlignment().update(torch.tensor([[-0.5, 1.5]]), torch.ones(1, 2))
