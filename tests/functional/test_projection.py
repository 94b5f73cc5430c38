import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_merge.functional.projection import (
    Quadratic,
    captured_energy,
    combine_rows,
    damped,
    excess,
    leading_directions,
    reachable,
    rotated,
    row_system,
    same_input,
    summed_system,
    weighted_sum,
)
from lightning_merge.functional.ridge import ridge_towards

SIZES = st.tuples(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(0, 999)
)


def problem(tasks, outputs, inputs, samples, seed):
    """Random task vectors, inputs, and residuals with a part that no update explains."""
    rng = np.random.default_rng(seed)
    deltas = rng.normal(size=(tasks, outputs, inputs))
    xs = [rng.normal(size=(inputs, samples + t)) for t in range(tasks)]
    rs = [
        d @ x + 0.3 * rng.normal(size=(outputs, x.shape[1]))
        for d, x in zip(deltas, xs, strict=True)
    ]
    weights = rng.uniform(0.5, 2, size=tasks)
    return deltas, xs, rs, weights


def quadratic(xs, rs, weights):
    parts = [
        Quadratic(
            gram=torch.tensor(x @ x.T)[None],
            cross=torch.tensor(r @ x.T)[None],
            energy=float((r**2).sum()),
            residual_gram=torch.tensor(r @ r.T)[None],
        )
        for x, r in zip(xs, rs, strict=True)
    ]
    return weighted_sum(parts, weights.tolist())


def loss(update, xs, rs, weights):
    return sum(w * ((update @ x - r) ** 2).sum() for x, r, w in zip(xs, rs, weights, strict=True))


@given(SIZES)
def test_the_objective_from_sums_is_that_of_the_activations(sizes):
    _, xs, rs, weights = problem(*sizes)
    update = np.random.default_rng(0).normal(size=(len(rs[0]), len(xs[0])))
    q = quadratic(xs, rs, weights)
    assert q.objective(torch.tensor(update)[None]) == pytest.approx(
        loss(update, xs, rs, weights), rel=1e-10
    )
    assert q.minus(q).energy == 0


@given(SIZES)
def test_task_and_row_coefficients_are_least_squares_on_stacked_outputs(sizes):
    deltas, xs, rs, weights = problem(*sizes)
    q = quadratic(xs, rs, weights)
    rows = row_system(q, torch.tensor(deltas)[:, None])
    scaled = [np.sqrt(w) * x for w, x in zip(weights, xs, strict=True)]
    target = np.concatenate([np.sqrt(w) * r for w, r in zip(weights, rs, strict=True)], 1)
    outputs = np.stack([d @ np.concatenate(scaled, 1) for d in deltas])  # (T, o, n)
    best = np.linalg.lstsq(outputs.reshape(len(deltas), -1).T, target.ravel(), rcond=None)[0]
    residual = ((np.tensordot(best, outputs, 1) - target) ** 2).sum()
    task = summed_system(rows)
    assert task.energy * (1 - task.captured) == pytest.approx(residual, rel=1e-8, abs=1e-9)
    assert task.objective(torch.tensor(best)[None, None]) == pytest.approx(residual, abs=1e-8)
    by_row = 0.0
    for r in range(len(target)):
        found = np.linalg.lstsq(outputs[:, r].T, target[r], rcond=None)[0]
        by_row += ((found @ outputs[:, r] - target[r]) ** 2).sum()
    assert rows.energy * (1 - rows.captured) == pytest.approx(by_row, rel=1e-8, abs=1e-8)


@given(SIZES)
def test_captured_energy_grows_with_the_basis_and_stays_in_the_unit_interval(sizes):
    deltas, xs, rs, weights = problem(*sizes)
    q = quadratic(xs, rs, weights)
    elements = torch.tensor(deltas)[:, None]
    rows = row_system(q, elements)
    outputs = len(rs[0])
    halves = torch.arange(outputs) // max(1, outputs // 2)
    full = captured_energy(q.gram, q.cross) / q.energy
    chain = [summed_system(rows).captured, summed_system(rows, halves).captured, rows.captured]
    chain.append(full)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(chain))
    assert chain[0] >= 0
    assert chain[-1] <= 1 + 1e-9
    more = torch.cat([elements, torch.randn(1, *elements.shape[1:], dtype=torch.float64)])
    assert summed_system(row_system(q, more)).captured >= chain[0] - 1e-9


def test_captured_energy_ignores_scaling_and_mixing_of_the_basis_and_a_scale_of_the_inputs():
    deltas, xs, rs, weights = problem(3, 4, 5, 8, 1)
    q = quadratic(xs, rs, weights)
    reference = summed_system(row_system(q, torch.tensor(deltas)[:, None])).captured
    mixing = np.random.default_rng(2).normal(size=(3, 3))
    mixed = torch.tensor(np.tensordot(mixing, deltas, 1))[:, None]
    assert summed_system(row_system(q, mixed)).captured == pytest.approx(reference, rel=1e-9)
    larger = quadratic([7 * x for x in xs], [7 * r for r in rs], weights)
    found = summed_system(row_system(larger, torch.tensor(deltas)[:, None])).captured
    assert found == pytest.approx(reference, rel=1e-9)
    twice = torch.tensor(np.concatenate([deltas, deltas[:1]]))[:, None]
    assert summed_system(row_system(q, twice)).captured == pytest.approx(reference, rel=1e-9)


def test_rotating_by_the_identity_or_reordering_directions_changes_nothing():
    deltas, xs, rs, weights = problem(2, 4, 3, 9, 3)
    q = quadratic(xs, rs, weights)
    elements = torch.tensor(deltas)[:, None]

    def energy(U):
        return row_system(rotated(q, U), U.mT @ elements).captured

    assert energy(torch.eye(4).double()[None]) == pytest.approx(row_system(q, elements).captured)
    U = torch.linalg.qr(torch.randn(1, 4, 4, dtype=torch.float64))[0]
    turned = U[..., [2, 0, 3, 1]] * torch.tensor([1.0, -1, 1, -1]).double()
    assert energy(turned) == pytest.approx(energy(U), rel=1e-9)
    assert energy(U) >= summed_system(row_system(q, elements)).captured - 1e-9


def test_a_subspace_captures_the_leading_eigenvalues_and_no_other_captures_more():
    _, xs, rs, weights = problem(3, 5, 4, 6, 5)
    q = quadratic(xs, rs, weights)
    values = torch.linalg.eigvalsh(reachable(q))[0].flip(0)
    previous = 0.0
    for rank in range(1, 6):
        U = leading_directions(reachable(q), rank)
        found = captured_energy(q.gram, rotated(q, U).cross)
        assert found == pytest.approx(float(values[:rank].sum()), rel=1e-9)
        assert found >= previous - 1e-9
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            other = torch.randn(1, 5, rank, generator=generator, dtype=torch.float64)
            other = torch.linalg.qr(other)[0]
            assert captured_energy(q.gram, other.mT @ q.cross) <= found + 1e-9
        raw = leading_directions(q.residual_gram, rank)
        assert captured_energy(q.gram, raw.mT @ q.cross) <= found + 1e-9
        previous = found
    assert found == pytest.approx(captured_energy(q.gram, q.cross), rel=1e-9)


def test_targets_in_the_span_are_captured_wholly():
    deltas, xs, _, weights = problem(3, 4, 5, 20, 6)
    one = same_input(torch.tensor(deltas[:1]), torch.tensor(xs[0] @ xs[0].T)[None])
    single = summed_system(row_system(one, torch.tensor(deltas[:1])[:, None]))
    assert single.captured == pytest.approx(1)
    assert float(single.cross / single.gram) == pytest.approx(1)
    mixture = 0.3 * deltas[0] - 2 * deltas[2]
    q = quadratic(xs, [mixture @ x for x in xs], weights)
    assert summed_system(row_system(q, torch.tensor(deltas)[:, None])).captured == pytest.approx(1)


def test_full_serves_tasks_with_orthogonal_inputs():
    deltas, _, _, weights = problem(2, 3, 6, 9, 7)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    xs = [basis[:, :3] @ np.random.default_rng(1).normal(size=(3, 9)), basis[:, 3:]]
    q = quadratic(xs, [d @ x for d, x in zip(deltas, xs, strict=True)], weights)
    assert captured_energy(q.gram, q.cross) / q.energy == pytest.approx(1)


def test_pythagoras():
    deltas, xs, rs, weights = problem(3, 4, 3, 9, 8)
    q = quadratic(xs, rs, weights)
    best = ridge_towards(q.cross, q.gram, torch.zeros(1, 4, 3).double(), 0.0)
    heuristic = 0.3 * torch.tensor(deltas.sum(0))[None]
    gap = q.objective(heuristic) - q.objective(best)
    assert excess(q, heuristic, best) == pytest.approx(gap, rel=1e-9)
    assert q.captured(heuristic) == pytest.approx(
        captured_energy(q.gram, q.cross) / q.energy - excess(q, heuristic, best) / q.energy
    )


def test_grouped_problems_are_one_block_diagonal_problem():
    parts = [problem(2, 3, 2, 7, seed) for seed in (1, 2, 3)]
    weights = np.ones(2)
    singles = [quadratic(xs, rs, weights) for _, xs, rs, _ in parts]
    grouped = Quadratic(
        gram=torch.cat([q.gram for q in singles]),
        cross=torch.cat([q.cross for q in singles]),
        energy=sum(q.energy for q in singles),
    )
    dense = Quadratic(
        gram=torch.block_diag(*[q.gram[0] for q in singles])[None],
        cross=torch.block_diag(*[q.cross[0] for q in singles])[None],
        energy=grouped.energy,
    )
    grouped_deltas = torch.tensor(np.stack([p[0] for p in parts], 1))
    dense_deltas = torch.stack([torch.block_diag(*d) for d in grouped_deltas])[:, None]
    rows, dense_rows = row_system(grouped, grouped_deltas), row_system(dense, dense_deltas)
    torch.testing.assert_close(rows.gram, dense_rows.gram)
    torch.testing.assert_close(rows.cross, dense_rows.cross)
    coefficients = torch.randn(9, 1, 2, dtype=torch.float64)
    update = combine_rows(coefficients, grouped_deltas)
    torch.testing.assert_close(
        torch.block_diag(*update)[None], combine_rows(coefficients, dense_deltas)
    )
    assert rows.objective(coefficients) == pytest.approx(grouped.objective(update))


def test_damping_keeps_the_diagonal():
    gram = torch.tensor([[[2.0, 1.0], [1.0, 3.0]]]).double()
    assert damped(gram, 0.9).tolist() == [[[2.0, 0.9], [0.9, 3.0]]]
