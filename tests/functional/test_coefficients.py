"""The automatic ridge without folds, against hat matrices of all observations in NumPy."""

import math

import numpy as np
import pytest
import torch

from lightning_merge.functional.bases import make_basis
from lightning_merge.functional.coefficients import (
    FREE_RIDGE,
    GRID,
    Start,
    chosen_ridge,
    held_out,
    searched_ridge,
)
from lightning_merge.functional.projection import Quadratic
from lightning_merge.functional.quadratic import Constraint
from tests.functional.test_projection import problem, quadratic

TASKS, OUTPUTS, INPUTS, SAMPLES = 2, 4, 3, 5


def designs(basis, deltas, x):
    """Problems of a basis: their design (observations, unknowns) and rows of the outputs."""
    made = np.stack([d @ x for d in deltas], -1)  # (o, n, T)
    if basis == "task":
        return [(made.reshape(-1, len(deltas)), list(range(OUTPUTS)))]
    if basis == "row":
        return [(made[r], [r]) for r in range(OUTPUTS)]
    if basis == "block":
        halves = [list(range(OUTPUTS // 2)), list(range(OUTPUTS // 2, OUTPUTS))]
        return [(made[rows].reshape(-1, len(deltas)), rows) for rows in halves]
    return [(x.T, [r]) for r in range(OUTPUTS)]  # full


def brute_force(basis, deltas, x, target, prior):
    """GCV of every ridge of the grid, from the hat matrix of every problem."""
    problems = designs(basis, deltas, x)
    unit = np.mean([np.diag(a.T @ a).mean() for a, _ in problems])
    scores = []
    for ridge in GRID.numpy() * unit:
        rss = df = 0.0
        for number, (a, rows) in enumerate(problems):
            solver = np.linalg.inv(a.T @ a + ridge * np.eye(a.shape[1])) @ a.T
            start = prior[number]
            left = target[rows].ravel() - a @ start
            rss += ((left - a @ solver @ left) ** 2).sum()
            df += np.trace(a @ solver)
        n = target.size
        scores.append(n * rss / (n - 1.4 * df) ** 2 if n > 1.4 * df else math.inf)
    return np.array(scores)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("basis", ["task", "row", "block", "full"])
def test_without_folds_the_ridge_has_the_least_generalised_cross_validation(basis, seed):
    deltas, xs, rs, weights = problem(TASKS, OUTPUTS, INPUTS, SAMPLES, seed)
    rng = np.random.default_rng(seed)
    rs = [r + 2 * rng.normal(size=r.shape) for r in rs]  # a middling ridge is the best
    q = quadratic(xs, rs, weights)
    elements = torch.tensor(deltas)[:, None]
    average = np.full(TASKS, 1 / TASKS)
    start = Start(update=elements.mean(0), weights=torch.tensor(average))

    def make(one):
        return make_basis(basis, one, elements, num_blocks=2)

    x = np.concatenate([np.sqrt(w) * x for w, x in zip(weights, xs, strict=True)], 1)
    target = np.concatenate([np.sqrt(w) * r for w, r in zip(weights, rs, strict=True)], 1)
    prior = deltas.mean(0) if basis == "full" else np.tile(average, (OUTPUTS, 1))
    scores = brute_force(basis, deltas, x, target, prior)
    observations = float(target.size)
    for folds in ([], [q]):  # none, and all samples in one
        found = chosen_ridge(make, q, folds, start, "auto", observations)
        assert found.source == "gcv"
        assert found.value == float(GRID[int(scores.argmin())])


def test_the_ridges_of_the_brute_force_differ():
    """So that the test above could fail: its best ridges are not all at one end of the grid."""
    best = set()
    for seed in range(4):
        deltas, xs, rs, weights = problem(TASKS, OUTPUTS, INPUTS, SAMPLES, seed)
        rng = np.random.default_rng(seed)
        rs = [r + 2 * rng.normal(size=r.shape) for r in rs]
        x = np.concatenate([np.sqrt(w) * x for w, x in zip(weights, xs, strict=True)], 1)
        target = np.concatenate([np.sqrt(w) * r for w, r in zip(weights, rs, strict=True)], 1)
        best.add(int(brute_force("full", deltas, x, target, deltas.mean(0)).argmin()))
    assert len(best) > 1
    assert any(0 < index < len(GRID) - 1 for index in best)


def test_too_few_samples_for_any_ridge_take_the_default():
    # One sample of 400 inputs: even the strongest ridge leaves 0.8 degrees of freedom of 1.
    x = torch.ones(1, 400, 1, dtype=torch.float64)
    r = torch.ones(1, 2, 1, dtype=torch.float64)
    q = Quadratic(gram=x @ x.mT, cross=r @ x.mT, energy=2.0)
    elements = torch.ones(1, 1, 2, 400, dtype=torch.float64)
    start = Start(update=elements[0] / 1000, weights=torch.ones(1, dtype=torch.float64))

    def make(one):
        return make_basis("full", one, elements)

    found = chosen_ridge(make, q, [], start, "auto", 2.0)
    assert (found.value, found.source) == (FREE_RIDGE, "too few samples")
    assert chosen_ridge(make, q, [], start, "auto", 20.0).source == "gcv"
    assert chosen_ridge(make, q, [], start, None, 2.0).source == "default"
    assert chosen_ridge(make, q, [], start, 0.5, 2.0).value == 0.5


def test_two_folds_with_samples_are_enough_for_held_out_errors():
    deltas, xs, rs, weights = problem(TASKS, OUTPUTS, INPUTS, SAMPLES, 1)
    elements = torch.tensor(deltas)[:, None]
    half = [
        quadratic([x[:, part] for x in xs], [r[:, part] for r in rs], weights)
        for part in (slice(0, 2), slice(2, None))
    ]
    basis = make_basis("task", half[0], elements)
    one, other = basis.system(half[0]), basis.system(half[1])
    prior = torch.full((1, 1, TASKS), 1 / TASKS, dtype=torch.float64)
    total = basis.system(quadratic(xs, rs, weights))
    found = searched_ridge(total, prior, [(one, other, prior), (other, one, prior)], 0.0, 1.0)
    assert found.source == "folds"
    errors = []
    for ridge in GRID.tolist():
        error = 0.0
        for train, test in ((one, other), (other, one)):
            unit = float(train.gram[0].diagonal().mean())
            A = train.gram[0].numpy() + ridge * unit * np.eye(TASKS)
            b = train.cross[0, 0].numpy() + ridge * unit / TASKS
            error += test.objective(torch.tensor(np.linalg.solve(A, b))[None, None])
        errors.append(error)
    assert found.value == pytest.approx(float(GRID[int(np.argmin(errors))]))


@pytest.mark.parametrize("basis", ["task", "row", "block", "full"])
@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_held_out_errors_are_those_of_refits_without_each_fold(basis, ridge):
    deltas, xs, rs, weights = problem(TASKS, OUTPUTS, INPUTS, 9, 4)
    elements = torch.tensor(deltas)[:, None]
    average = np.full(TASKS, 1 / TASKS)
    start = Start(update=elements.mean(0), weights=torch.tensor(average))
    prior = deltas.mean(0) if basis == "full" else np.tile(average, (OUTPUTS, 1))
    folds = [range(3), range(3, 5), range(5, 99)]

    def cut(values, fold, inside):
        return [v[:, [(j in fold) == inside for j in range(v.shape[1])]] for v in values]

    def stacked(values):
        return np.concatenate([np.sqrt(w) * v for w, v in zip(weights, values, strict=True)], 1)

    expected = 0.0
    for fold in folds:
        x, r = (stacked(cut(values, fold, inside=False)) for values in (xs, rs))
        left_x, left_r = (stacked(cut(values, fold, inside=True)) for values in (xs, rs))
        trained, tested = designs(basis, deltas, x), designs(basis, deltas, left_x)
        unit = np.mean([np.diag(a.T @ a).mean() for a, _ in trained])
        for number, ((a, rows), (b, _)) in enumerate(zip(trained, tested, strict=True)):
            curvature = a.T @ a + ridge * unit * np.eye(a.shape[1])
            right = a.T @ r[rows].ravel() + ridge * unit * prior[number]
            expected += ((b @ np.linalg.solve(curvature, right) - left_r[rows].ravel()) ** 2).sum()

    def make(one):
        return make_basis(basis, one, elements, num_blocks=2)

    parts = [quadratic(cut(xs, f, inside=True), cut(rs, f, inside=True), weights) for f in folds]
    total = quadratic(xs, rs, weights)
    found = held_out(make, total, parts, start, ridge, Constraint())
    assert found == pytest.approx(expected, rel=1e-9)
