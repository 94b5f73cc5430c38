import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_merge.functional.della import keep_probabilities
from lightning_merge.methods import DARE, DELLA, TIES
from tests.methods.models import flat, model_sets, models


def reference(task_vector, density, epsilon):
    rows = task_vector.reshape(1, -1) if task_vector.ndim < 2 else task_vector
    rows = rows.reshape(len(rows), -1)
    out = np.full(rows.shape, density)
    for row, values in zip(out, rows, strict=True):
        ranks = sorted(range(len(values)), key=lambda j: (abs(values[j]), j))
        for rank, j in enumerate(ranks):
            if len(values) > 1:
                row[j] = density - epsilon + 2 * epsilon * rank / (len(values) - 1)
    return out.reshape(task_vector.shape)


@given(
    shape=st.lists(st.integers(1, 5), max_size=4),
    seed=st.integers(0, 99),
    epsilon=st.sampled_from([0.0, 0.1, 0.4]),
)
def test_probabilities(shape, seed, epsilon):
    values = np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)
    found = keep_probabilities(torch.tensor(values), 0.5, epsilon)
    np.testing.assert_allclose(found, reference(values, 0.5, epsilon), rtol=1e-6)


@given(data=model_sets())
def test_density_one_keeps_everything(data):
    base, experts = data
    merged = DELLA(density=1.0, epsilon=0.0).merge(base, experts)
    plain = TIES(density=1.0, scope="tensor").merge(base, experts)
    assert all(torch.equal(merged[name], plain[name]) for name in base)


@given(data=model_sets())
def test_epsilon_zero_is_dare(data):
    base, experts = data
    della = DELLA(density=0.5, epsilon=0.0, combine="sum", scale=0.3).merge(base, experts)
    dare = DARE(density=0.5).merge(base, experts)
    assert all(torch.equal(della[name], dare[name]) for name in base)


def test_mean_over_seeds_is_the_task_vector():
    base, experts = models(1, shapes={"w": (3, 4)})
    update = flat(experts["task0"]) - flat(base)
    method = {"density": 0.4, "epsilon": 0.3, "combine": "sum", "scale": 1.0}
    draws = [flat(DELLA(**method, seed=s).merge(base, experts)) - flat(base) for s in range(400)]
    p = keep_probabilities(torch.tensor(update).view(3, 4), 0.4, 0.3).numpy().ravel()
    error = np.abs(update) * np.sqrt((1 - p) / p / 400)
    assert (np.abs(np.mean(draws, axis=0) - update) < 4.5 * error).all()


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.5), (0.9, 0.2), (0.5, -0.1)])
def test_range_errors(density, epsilon):
    with pytest.raises(ValueError, match=r"epsilon must lie in \[0, "):
        DELLA(density=density, epsilon=epsilon)
