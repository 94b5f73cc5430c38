import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lightning_merge.methods.compress import CompressedExperts, TSVCompress
from tests.methods.models import models

SHAPES = {"w": (20, 30), "conv": (16, 3, 3, 3), "b": (20,), "thin": (2, 3)}


@pytest.fixture
def pair():
    base, experts = models(4, shapes=SHAPES)
    base["n"] = torch.tensor(1)
    for t, expert in enumerate(experts.values()):
        expert["n"] = torch.tensor(t)
    return base, experts


def test_error_is_that_of_the_singular_values_left_out(pair, tmp_path):
    base, experts = pair
    store = TSVCompress().save(tmp_path / "c.safetensors", base, experts)
    for task, expert in experts.items():
        rebuilt = store.expert(task, base)
        assert list(rebuilt) == list(base)
        for name in ("w", "conv"):
            update = (expert[name] - base[name]).double().flatten(1).numpy()
            left_out = np.linalg.svd(update)[1][min(update.shape) // 4 :]
            error = float((rebuilt[name] - expert[name]).double().square().sum())
            assert error == pytest.approx((left_out**2).sum(), rel=1e-4)
        for name in ("b", "n", "thin"):
            assert torch.equal(rebuilt[name], expert[name])
            assert rebuilt[name].dtype == base[name].dtype


def test_error_falls_with_the_rank_and_full_rank_is_lossless(pair, tmp_path):
    base, experts = pair
    errors = []
    for rank in (1, 5, 10, 20):
        store = TSVCompress(rank=rank).save(tmp_path / "c.safetensors", base, experts)
        errors.append(float((store.expert("task0", base)["w"] - experts["task0"]["w"]).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0.0


def test_size_follows_the_formula(tmp_path):
    base, experts = models(4, shapes={"w": (40, 60)})
    TSVCompress().save(tmp_path / "c.safetensors", base, experts)
    payload = 4 * 4 * 10 * (40 + 60 + 1)  # bytes, experts, rank
    size = (tmp_path / "c.safetensors").stat().st_size
    assert payload < size < payload + 4000


def test_kernels_whole(pair, tmp_path):
    base, experts = pair
    method = TSVCompress(convolutions="mean")
    store = method.save(tmp_path / "c.safetensors", base, experts)
    assert torch.equal(store.expert("task2", base)["conv"], experts["task2"]["conv"])


def test_errors(pair, tmp_path):
    base, experts = pair
    path = tmp_path / "c.safetensors"
    store = TSVCompress().save(path, base, experts)
    with pytest.raises(ValueError, match="no expert 'x'; the file holds task0, task1"):
        store.expert("x", base)
    with pytest.raises(ValueError, match="no parameter 'new'"):
        store.expert("task0", {"new": torch.zeros(1)})
    with pytest.raises(ValueError, match="'w' has 600 entries, the base has 4"):
        store.expert("task0", {"w": torch.zeros(2, 2)})
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no compressed experts"):
        CompressedExperts(path)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        TSVCompress(rank=0)
    experts["task0"]["w"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="expert 'task0': parameter 'w'"):
        TSVCompress().save(path, base, experts)
