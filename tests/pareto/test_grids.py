import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_merge.pareto import (
    das_dennis,
    dirichlet,
    equal,
    interior,
    one_hot,
    pairwise,
    priority,
    response,
)

TASKS = st.integers(1, 20)


def assert_preferences(points, num_tasks):
    assert points.dtype == torch.float64
    assert points.ndim == 2
    assert points.shape[1] == num_tasks
    assert bool((points >= 0).all())
    rows = points.tolist()
    assert all(abs(math.fsum(row) - 1) <= 1e-15 for row in rows)
    assert len({tuple(row) for row in rows}) == len(rows)


@settings(deadline=None)
@given(TASKS, st.floats(0, 1), st.integers(2, 13), st.data())
def test_every_small_grid_is_made_of_preferences(num_tasks, weight, num_points, data):
    task = data.draw(st.integers(0, num_tasks - 1))
    for points in (
        equal(num_tasks),
        one_hot(num_tasks),
        one_hot(num_tasks, task),
        priority(num_tasks, weight=weight),
        priority(num_tasks, task, weight=weight),
        response(num_tasks, task, num_points),
        dirichlet(num_tasks, num_points, seed=3),
        dirichlet(num_tasks, num_points, concentration=0.05),
    ):
        assert_preferences(points, num_tasks)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 4), st.floats(0, 1))
def test_das_dennis_holds_every_lattice_point_once_in_order(num_tasks, divisions, inner, share):
    points = das_dennis(num_tasks, divisions)
    assert_preferences(points, num_tasks)
    assert len(points) == math.comb(divisions + num_tasks - 1, num_tasks - 1)
    expected = [
        [i / divisions for i in row]
        for row in itertools.product(range(divisions + 1), repeat=num_tasks)
        if sum(row) == divisions
    ]
    assert points.tolist() == expected
    both = das_dennis(num_tasks, divisions, inner=inner, epsilon=share / num_tasks)
    assert_preferences(both, num_tasks)
    assert bool((both >= share / num_tasks - 1e-15).all())


@pytest.mark.parametrize(
    ("num_tasks", "divisions", "count"), [(3, 12, 91), (8, 3, 120), (8, 4, 330)]
)
def test_das_dennis_counts_of_the_papers(num_tasks, divisions, count):
    assert len(das_dennis(num_tasks, divisions)) == count


def test_inner_layer_is_the_lattice_moved_half_way_to_the_centre():
    outer, inner = das_dennis(3, 4, inner=2)[:15], das_dennis(3, 4, inner=2)[15:]
    torch.testing.assert_close(outer, das_dennis(3, 4))
    torch.testing.assert_close(inner, (das_dennis(3, 2) + equal(3)) / 2)


def test_priority_and_response_share_the_rest_equally():
    assert priority(5, 2, weight=0.6).tolist() == [[0.1, 0.1, 0.6, 0.1, 0.1]]
    path = response(5, 4, 6)
    torch.testing.assert_close(path[:, 4], torch.linspace(0, 1, 6, dtype=torch.float64))
    assert bool((path[:, :4] == path[:, :1]).all())
    assert priority(4, weight=0.25).tolist() == equal(4).tolist()  # four times one point


@settings(deadline=None)
@given(st.integers(2, 9), st.integers(2, 12), st.floats(0, 0.99), st.data())
def test_pairwise_is_an_edge_with_an_optional_floor(num_tasks, num_points, floor, data):
    first, second = data.draw(st.permutations(range(num_tasks)))[:2]
    points = pairwise(num_tasks, first, second, num_points, floor=floor)
    assert_preferences(points, num_tasks)
    assert len(points) == num_points
    others = [task for task in range(num_tasks) if task not in (first, second)]
    torch.testing.assert_close(
        points[:, others], torch.full_like(points[:, others], floor / num_tasks)
    )
    assert bool((points[:, second].diff() > 0).all())
    assert bool((points[:, first].diff() < 0).all())
    torch.testing.assert_close(points[0, first].item(), 1 - floor + floor / num_tasks)
    torch.testing.assert_close(points, points[:, :].clone())


def test_dirichlet_repeats_with_its_seed_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    assert torch.equal(dirichlet(4, 10, seed=1), dirichlet(4, 10, seed=1))
    assert not torch.equal(dirichlet(4, 10, seed=1), dirichlet(4, 10, seed=2))
    assert torch.equal(torch.get_rng_state(), before)
    spread = dirichlet(3, 4000, concentration=2.0).var(dim=0)
    # variance of one weight: (1/T)(1 - 1/T)/(T α + 1); 4000 draws give it to about 3 %
    torch.testing.assert_close(spread, torch.full_like(spread, (2 / 9) / 7), rtol=0.1, atol=0)


def test_interior_can_collapse_to_the_centre():
    torch.testing.assert_close(interior(one_hot(4), 0.25), equal(4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: equal(0), "num_tasks must be at least 1, found 0"),
        (lambda: one_hot(3, 3), "task is 3, expected the index of one of 3 tasks"),
        (lambda: priority(3, weight=1.5), "weight must be between 0 and 1, found 1.5"),
        (lambda: priority(3, weight=float("nan")), "weight must be between 0 and 1, found nan"),
        (lambda: pairwise(1, 0, 0), "num_tasks must be at least 2"),
        (lambda: pairwise(3, 1, 1), "two different tasks"),
        (lambda: pairwise(3, 0, 1, 1), "num_points must be at least 2"),
        (lambda: pairwise(3, 0, 1, floor=1.5), "epsilon must be between 0 and 1/T"),
        (lambda: das_dennis(3, 0), "divisions must be at least 1"),
        (lambda: das_dennis(20, 10), "20,030,010 points; the limit is 1,000,000"),
        (lambda: dirichlet(3, 5, concentration=0.0), "concentration must be a finite number above"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
