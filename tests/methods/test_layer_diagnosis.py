"""Shares of every basis against a plain reference: one dense least squares a basis and fold."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_merge.functional.projection import Quadratic, reachable, reachable_directions
from lightning_merge.layers.collecting import Collecting
from lightning_merge.layers.statistics import Sampling
from lightning_merge.methods import Average
from lightning_merge.methods.layer_diagnosis import (
    BASES,
    diagnose_layers,
    energy_mean,
    network_shares,
)
from lightning_merge.methods.layerwise import LayerWalk
from lightning_merge.methods.projection import ALL_KINDS
from tests.layers.networks import Convolutions, case

FOLDS = 3


def normed() -> nn.Module:
    """Layers with more outputs than inputs and with fewer, and a norm; the head is ``4``."""
    return nn.Sequential(
        nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, 3)
    )


def walk_of(network, head, shape):
    base, states, calibration, _ = case(network, head, shape)
    options = Collecting(sampling=Sampling(num_folds=FOLDS), bias=True, residual_gram=True)
    return LayerWalk(base, states, calibration, Average(), ALL_KINDS, options)


def weighted(parts, weights):
    """G, P, E and e of some folds, summed over tasks in NumPy."""

    def added(name):
        return sum(w * getattr(q, name).numpy() for q, w in zip(parts, weights, strict=True))

    energy = sum(w * q.energy for q, w in zip(parts, weights, strict=True))
    return added("gram"), added("cross"), added("residual_gram"), energy


def elements(name, deltas, quadratic):
    """All elements of a basis, each a whole update (g, o, i)."""
    gram, cross, residual, _ = quadratic
    g, o, i = deltas.shape[1:]
    if name == "task":
        return list(deltas)
    if name in ("row", "block"):
        rows = np.arange(g * o)
        groups = rows if name == "row" else rows * min(8, g * o) // (g * o)
        masks = [(groups == k).reshape(g, o, 1) for k in range(groups[-1] + 1)]
        return [mask * delta for mask in masks for delta in deltas]
    found = []
    for k in range(g):
        if name == "full":
            U, parts = np.eye(o), np.eye(i)[:, None]
        elif name == "subspace":
            K = cross[k] @ np.linalg.pinv(gram[k], rcond=1e-13, hermitian=True) @ cross[k].T
            U, parts = np.linalg.eigh(K)[1][:, ::-1][:, : max(1, o // 4)], np.eye(i)[:, None]
        else:
            U, parts = np.linalg.eigh(residual[k])[1], None
        for u in U.T:
            for part in [u @ delta[k] for delta in deltas] if parts is None else parts[:, 0]:
                update = np.zeros((g, o, i))
                update[k] = np.outer(u, part)
                found.append(update)
    return found


def system(basis, quadratic):
    gram, cross, *_ = quadratic
    B = np.stack([b.reshape(-1) for b in basis])
    products = np.stack([(b @ gram).reshape(-1) for b in basis])
    return products @ B.T, B @ cross.reshape(-1)


def prior(name, basis, deltas):
    """Coefficients of the average update, or its part in the basis for free matrices."""
    if name in ("full", "subspace"):
        average = deltas.mean(0)
        return np.array([(b * average).sum() for b in basis])
    return np.full(len(basis), 1 / len(deltas))


def objective(update, quadratic):
    gram, cross, _, energy = quadratic
    return ((update @ gram - 2 * cross) * update).sum() + energy


def minus(total, fold):
    return tuple(a - b for a, b in zip(total, fold, strict=True))


def reference(name, problem):
    """Share in sample and share held out."""
    deltas = problem.deltas.numpy()
    energies = [sum(q.energy for q in folds) for folds in problem.parts]
    weights = [1 / len(energies) / energy for energy in energies]
    folds = [weighted(parts, weights) for parts in zip(*problem.parts, strict=True)]
    total = tuple(sum(parts) for parts in zip(*folds, strict=True))
    Q, c = system(elements(name, deltas, total), total)
    inside = c @ np.linalg.lstsq(Q, c, rcond=1e-13)[0] / total[3]
    error = 0.0
    for fold in folds:
        rest = minus(total, fold)
        basis = elements(name, deltas, rest)
        Q, c = system(basis, rest)
        unit = np.trace(Q) / len(Q)
        ridge = unit * (1e-3 if name in ("full", "subspace") else 1e-6)
        alpha = np.linalg.solve(Q + ridge * np.eye(len(Q)), c + ridge * prior(name, basis, deltas))
        error += objective(np.tensordot(alpha, np.stack(basis), 1), fold)
    return inside, 1 - error / total[3]


@pytest.mark.parametrize(
    ("network", "head", "shape"), [(normed(), "4", (4,)), (Convolutions(), "head", (2, 7, 7))]
)
def test_shares_are_those_of_one_dense_least_squares_a_basis_and_fold(network, head, shape):
    walk = walk_of(network.eval(), head, shape)
    statistics = walk.expert_statistics()
    equal = torch.full((len(walk.experts),), 1 / len(walk.experts), dtype=torch.float64)
    found = diagnose_layers(walk, statistics, {}, equal)
    assert {layer.kind for layer in found} >= {"norm"}
    for layer, site in zip(found, walk.sites, strict=True):
        problem = walk.problem(site, statistics[site.name])
        for name in BASES[1:]:
            inside, outside = reference("full" if layer.kind == "norm" else name, problem)
            assert layer.in_sample[name] == pytest.approx(inside, rel=1e-9, abs=1e-9)
            assert layer.held_out[name] == pytest.approx(outside, rel=1e-9, abs=1e-9)


def test_shared_coefficients_are_one_least_squares_over_all_layers():
    walk = walk_of(normed().eval(), "4", (4,))
    statistics = walk.expert_statistics()
    equal = torch.full((len(walk.experts),), 1 / len(walk.experts), dtype=torch.float64)
    found = diagnose_layers(walk, statistics, {}, equal)
    totals, folds, deltas = [], [], []
    for site in walk.sites:
        problem = walk.problem(site, statistics[site.name])
        weights = [1 / len(problem.energies) / energy for energy in problem.energies]
        parts = [weighted(parts, weights) for parts in zip(*problem.parts, strict=True)]
        folds.append(parts)
        totals.append(tuple(sum(each) for each in zip(*parts, strict=True)))
        deltas.append(problem.deltas.numpy())
    systems = [system(list(d), q) for d, q in zip(deltas, totals, strict=True)]
    best = np.linalg.solve(sum(Q for Q, _ in systems), sum(c for _, c in systems))
    errors = np.zeros(len(totals))
    for k in range(FOLDS):
        pairs = [
            system(list(d), minus(total, parts[k]))
            for d, total, parts in zip(deltas, totals, folds, strict=True)
        ]
        Q, c = sum(Q for Q, _ in pairs), sum(c for _, c in pairs)
        ridge = 1e-6 * np.trace(Q) / len(Q)
        alpha = np.linalg.solve(Q + ridge * np.eye(len(Q)), c + ridge / len(Q))
        errors += [
            objective(np.tensordot(alpha, d, 1), parts[k])
            for d, parts in zip(deltas, folds, strict=True)
        ]
    for layer, total, delta, error in zip(found, totals, deltas, errors, strict=True):
        inside = 1 - objective(np.tensordot(best, delta, 1), total) / total[3]
        assert layer.in_sample["task_global"] == pytest.approx(inside, rel=1e-9, abs=1e-9)
        assert layer.held_out["task_global"] == pytest.approx(1 - error / total[3], rel=1e-9)


def test_the_shares_of_merges_need_no_basis():
    walk = walk_of(normed().eval(), "4", (4,))
    statistics = walk.expert_statistics()
    merges = {"average": Average().merge(walk.base, walk.experts), "base": walk.base}
    equal = torch.full((len(walk.experts),), 1 / len(walk.experts), dtype=torch.float64)
    layers = diagnose_layers(walk, statistics, merges, equal)
    found = network_shares(walk, statistics, merges, equal)
    assert found["base"] == pytest.approx(0, abs=1e-12)
    expected = energy_mean(layers, lambda layer: layer.heuristics["average"])
    assert found["average"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("outputs", "inputs"), [(9, 4), (4, 9), (5, 5)])
def test_reachable_directions_are_eigenvectors_whatever_side_is_smaller(outputs, inputs):
    x = torch.randn(2, inputs, 30, dtype=torch.float64)
    r = torch.randn(2, outputs, 30, dtype=torch.float64)
    q = Quadratic(gram=x @ x.mT, cross=r @ x.mT, energy=float(r.square().sum()))
    K = reachable(q)
    for rank in (1, 3):
        U = reachable_directions(q, rank)
        values = torch.linalg.eigvalsh(K).flip(-1)[:, :rank]
        torch.testing.assert_close(U.mT @ U, torch.eye(rank).double().expand(2, rank, rank))
        torch.testing.assert_close(K @ U, U * values[:, None], rtol=1e-9, atol=1e-9)
