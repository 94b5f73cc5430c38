import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lightning_merge.methods.compress import CompressedExperts, TSVCompress
from lightning_merge.methods.tall_store import TALLCompress
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
    for shape in ((2, 2), (30, 20)):
        with pytest.raises(ValueError, match=r"'w' is a matrix 20 x 30, the base has shape \("):
            store.expert("task0", {"w": torch.zeros(shape)})
    with pytest.raises(ValueError, match=r"'b' has shape \(20,\), the base's is \(7,\)"):
        store.expert("task0", {"b": torch.zeros(7)})
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no compressed experts"):
        CompressedExperts(path)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        TSVCompress(rank=0)
    experts["task0"]["w"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="expert 'task0': parameter 'w'"):
        TSVCompress().save(path, base, experts)


STORES = pytest.mark.parametrize("kind", [TSVCompress, TALLCompress])


@STORES
@pytest.mark.parametrize("name", ["w", "b"])
def test_a_base_that_is_not_finite_is_named(kind, name, pair, tmp_path):
    base, experts = pair
    base[name].view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=f"the base: parameter '{name}' holds 1 non-finite"):
        kind().save(tmp_path / "c.safetensors", base, experts)
    assert not (tmp_path / "c.safetensors").exists()


@STORES
def test_wide_experts_of_a_half_precision_base_come_back_in_its_dtypes(kind, pair, tmp_path):
    base, experts = pair
    half = {n: v.bfloat16() if v.is_floating_point() else v for n, v in base.items()}
    rebuilt = kind().save(tmp_path / "c.safetensors", half, experts).expert("task1", half)
    assert {n: v.dtype for n, v in rebuilt.items()} == {n: v.dtype for n, v in half.items()}
    alone = {"task1": experts["task1"]}
    whole = {TSVCompress: TSVCompress(rank=20), TALLCompress: TALLCompress()}[kind]
    rebuilt = whole.save(tmp_path / "c.safetensors", half, alone).expert("task1", half)
    for name, value in alone["task1"].items():
        torch.testing.assert_close(rebuilt[name], value.to(half[name].dtype), atol=2e-3, rtol=2**-7)


@STORES
def test_ties_are_stored_once_and_come_back_tied(kind, tmp_path):
    base, experts = models(3, shapes={"a": (40, 60), "c": (5,)})
    sizes = []
    for tied in (False, True):
        if tied:
            base["b"] = base["a"]
            for expert in experts.values():
                expert["b"] = expert["a"]
        store = kind().save(tmp_path / "t.safetensors", base, experts)
        sizes.append((tmp_path / "t.safetensors").stat().st_size)
    assert sizes[1] < sizes[0] + 200
    rebuilt = store.expert("task1", base)
    assert list(rebuilt) == list(base)
    assert rebuilt["b"] is rebuilt["a"]
    # read from a file, a base has the tied value twice, or under one of the names
    untied = {name: value.clone() for name, value in base.items()}
    assert torch.equal(store.expert("task1", untied)["b"], rebuilt["a"])
    del untied["a"]
    assert torch.equal(store.expert("task1", untied)["b"], rebuilt["a"])
