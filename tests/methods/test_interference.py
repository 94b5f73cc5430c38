import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_merge.functional.interference import interference, sign_conflict
from lightning_merge.methods import TaskArithmetic
from lightning_merge.methods.interference import measure_interference
from tests.methods.models import models


@given(num=st.integers(1, 4), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_against_numpy(num, size, seed):
    rng = np.random.default_rng(seed)
    vectors, base = rng.integers(-1, 2, (num, size)).astype(np.float32), rng.normal(size=size)
    found = interference(torch.tensor(base), torch.tensor(vectors))
    norms = np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(found.norms, norms)
    expected = np.sqrt((norms**2).mean()) / np.linalg.norm(base)
    assert found.relative_norm == pytest.approx(expected)
    for i in range(num):
        for j in range(num):
            both = norms[i] * norms[j]
            cosine = vectors[i] @ vectors[j] / both if both else 0.0
            assert found.cosines[i][j] == pytest.approx(cosine, abs=1e-6)
    shared = (vectors != 0).sum(axis=0) >= 2
    differ = shared & (vectors.max(axis=0) > 0) & (vectors.min(axis=0) < 0)
    assert found.sign_conflict == differ.sum() / max(1, shared.sum())
    assert found.singular is None


def test_singular_interference_of_orthogonal_and_equal_tasks():
    eye = torch.eye(6)
    apart = torch.stack([eye[:, [i]] @ eye[[i]] for i in range(2)])
    assert interference(torch.ones(6, 6), apart).singular == pytest.approx(0, abs=1e-12)
    same = apart[:1].expand(2, -1, -1)
    assert interference(torch.ones(6, 6), same).singular == pytest.approx(1.0)
    assert interference(torch.zeros(6, 6), torch.zeros(2, 6, 6)).relative_norm == 0.0
    assert sign_conflict(torch.zeros(1, 3)) == 0.0


def test_parameters_of_the_method_alone():
    base, experts = models(2)
    method = TaskArithmetic(include=("fc.*",))
    found = dict(measure_interference(method, base, experts))
    assert list(found) == ["fc.bias", "fc.weight"]
    task_vector = experts["task1"]["fc.bias"] - base["fc.bias"]
    assert found["fc.bias"].norms[1] == pytest.approx(float(task_vector.norm()), rel=1e-5)
