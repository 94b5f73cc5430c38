import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_merge.functional import quadratic
from lightning_merge.functional.quadratic import Constraint, solve_constrained, stationarity

KINDS = {
    "none": Constraint(),
    "sum": Constraint(total=1.0),
    "nonnegative": Constraint(lower=0.0),
    "box": Constraint(lower=-0.2, upper=0.6),
    "simplex": Constraint(lower=0.0, total=1.0),
    "box and sum": Constraint(lower=-0.3, upper=0.8, total=0.7),
}


def problems(batch, size, seed, rank=None):
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(batch, size, rank or size + 2))
    gram = factors @ factors.transpose(0, 2, 1)
    return torch.tensor(gram), torch.tensor(gram @ rng.normal(size=(batch, size, 1)))[..., 0]


def enumerated(gram, cross, constraint):
    """The optimum by trying every set of active bounds."""
    size, best = len(cross), (np.inf, None)
    low = -np.inf if constraint.lower is None else constraint.lower
    high = np.inf if constraint.upper is None else constraint.upper
    options = [None, *(x for x in (low, high) if np.isfinite(x))]
    for active in itertools.product(options, repeat=size):
        free = [i for i in range(size) if active[i] is None]
        point = np.array([0.0 if a is None else a for a in active])
        if free:
            system = gram[np.ix_(free, free)]
            right = cross[free] - gram[free] @ point
            if constraint.total is not None:
                one = np.ones((len(free), 1))
                system = np.block([[system, one], [one.T, np.zeros((1, 1))]])
                right = np.append(right, constraint.total - point.sum())
            point[free] = np.linalg.lstsq(system, right, rcond=None)[0][: len(free)]
        feasible = (point >= low - 1e-9).all() and (point <= high + 1e-9).all()
        if constraint.total is not None:
            feasible &= abs(point.sum() - constraint.total) < 1e-9
        if feasible:
            best = min(best, (point @ gram @ point - 2 * cross @ point, tuple(point)))
    return best[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 6])
@given(size=st.integers(1, 4), seed=st.integers(0, 9999))
def test_the_optimum_is_that_of_an_enumeration_of_active_sets(kind, batch, size, seed):
    constraint = KINDS[kind]
    if kind == "box and sum" and size == 1:
        constraint = Constraint(lower=0.1, upper=0.8, total=0.7)
    gram, cross = problems(batch, size, seed)
    found = solve_constrained(gram, cross, constraint, torch.zeros(batch, size).double())
    assert constraint.violation(found) <= 1e-9
    assert (stationarity(gram, cross, found, constraint) <= 1).all()
    for Q, c, a in zip(gram, cross, found, strict=True):
        value = float(a @ Q @ a - 2 * c @ a)
        assert value == pytest.approx(enumerated(Q.numpy(), c.numpy(), constraint), abs=1e-7)


def test_without_the_library_single_problems_are_solved_too(monkeypatch):
    gram, cross = problems(1, 5, 3)
    start = torch.zeros(1, 5).double()
    with_library = solve_constrained(gram, cross, KINDS["simplex"], start)
    monkeypatch.setattr(quadratic, "daqp_installed", lambda: False)
    torch.testing.assert_close(
        solve_constrained(gram, cross, KINDS["simplex"], start), with_library, rtol=0, atol=1e-7
    )


def test_singular_problems_keep_the_start_where_nothing_is_known():
    gram = torch.tensor([[[1.0, 1.0], [1.0, 1.0]]]).double()
    cross = torch.tensor([[2.0, 2.0]]).double()
    start = torch.tensor([[3.0, 1.0]]).double()
    torch.testing.assert_close(
        solve_constrained(gram, cross, Constraint(), start), torch.tensor([[2.0, 0.0]]).double()
    )
    found = solve_constrained(gram, cross, Constraint(lower=0.0), start)
    assert float(found.sum()) == pytest.approx(2)


def test_ill_conditioned_and_large_batches_pass_their_checks():
    gram, cross = problems(200, 6, 1, rank=3)
    gram = gram + 1e-6 * torch.eye(6).double()
    start = torch.full((200, 6), 1 / 6).double()
    found = solve_constrained(gram, cross, KINDS["simplex"], start)

    def value(a):
        return ((a[:, None] @ gram)[:, 0] * a).sum(1) - 2 * (cross * a).sum(1)

    assert (value(found) <= value(start) + 1e-9).all()


@given(st.integers(1, 6), st.integers(0, 999))
def test_projections_are_nearest_points(size, seed):
    rng = np.random.default_rng(seed)
    points = torch.tensor(rng.normal(size=(3, size)) * 3)
    for constraint in (KINDS["simplex"], KINDS["box"], Constraint(total=2.0)):
        nearest = constraint.project(points)
        assert constraint.violation(nearest) <= 1e-12
        other = constraint.project(torch.tensor(rng.normal(size=(3, size))))
        # Obtuse angle between the way to the projection and the set.
        angle = ((points - nearest) * (other - nearest)).sum(1)
        assert (angle <= 1e-9).all()


def test_infeasible_constraints_are_refused():
    with pytest.raises(ValueError, match=r"lower=1.0 is above upper=0.0"):
        Constraint(lower=1.0, upper=0.0).check(3)
    with pytest.raises(ValueError, match="3 coefficients between 0.0 and 0.2 cannot sum"):
        Constraint(lower=0.0, upper=0.2, total=1.0).check(3)
    with pytest.raises(ValueError, match="finite"):
        Constraint(lower=float("nan")).check(3)
