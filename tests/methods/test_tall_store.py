import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lightning_merge.methods import MaskedExperts, TALLCompress, TSVCompress
from lightning_merge.methods.buffers import knowing_buffers
from tests.methods.models import models

SHAPES = {"a.w": (7, 5), "a.b": (3,), "scale": (), "empty": (0, 4), "norm.running_var": (4,)}


def saved(path, num_experts=3, seed=0, **options):
    base, experts = models(num_experts, seed, SHAPES)
    base["steps"] = torch.tensor(1)
    for index, expert in enumerate(experts.values()):
        expert["steps"] = torch.tensor(index)
    return base, experts, TALLCompress(**options).save(path / "t.safetensors", base, experts)


@given(seed=st.integers(0, 999), num=st.integers(1, 4), kappa=st.sampled_from([0.0, 0.3, 1.0]))
def test_experts_by_the_equation(seed, num, kappa, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tall")
    base, experts, store = saved(folder, num, seed, threshold=kappa)
    assert store.tasks == tuple(experts)
    for task, expert in experts.items():
        found = store.expert(task, base)
        assert list(found) == list(base)
        for name in ("a.w", "a.b", "scale", "empty"):
            rows = np.stack([np.asarray(e[name] - base[name]) for e in experts.values()])
            own, total = np.asarray(expert[name] - base[name]), rows.sum(axis=0)
            mask = np.abs(own) > kappa * np.abs(total - own)
            np.testing.assert_allclose(
                found[name], np.asarray(base[name]) + mask * total, atol=1e-6
            )
        for name in ("norm.running_var", "steps"):
            assert torch.equal(found[name], expert[name])


def test_one_expert_is_lossless_and_zero_updates_stay(tmp_path):
    base, experts, store = saved(tmp_path, 1)
    for name, value in store.expert("task0", base).items():
        torch.testing.assert_close(value, experts["task0"][name])
    experts["task0"]["a.w"] = base["a.w"].clone()
    other = {n: v + 1 if v.is_floating_point() else v for n, v in base.items()}
    both = {"same": experts["task0"], "other": other}
    store = TALLCompress(threshold=0.0).save(tmp_path / "z.safetensors", base, both)
    assert torch.equal(store.expert("same", base)["a.w"], base["a.w"])


def test_masks_shrink_as_the_threshold_grows(tmp_path):
    densities = [saved(tmp_path, threshold=k)[2].density("task1") for k in (0.0, 0.3, 0.6, 1e9)]
    assert densities[0] == 1.0
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] == 0.0
    store = saved(tmp_path, threshold=0.0, thresholds={"task2": 1e9})[2]
    assert (store.density("task1"), store.density("task2")) == (1.0, 0.0)


def test_size_is_one_vector_and_bits(tmp_path):
    base, experts = models(8, shapes={"w": (64, 100)})
    TALLCompress().save(tmp_path / "t.safetensors", base, experts)
    payload = 4 * 6400 + 8 * 6400 // 8
    assert payload < (tmp_path / "t.safetensors").stat().st_size < payload + 2000


def test_half_precision_takes_half_the_size_and_loses_a_rounding(tmp_path):
    shapes = {"w": (64, 100), "bn.deviation": (4,)}
    base, experts = models(8, shapes=shapes, dtype=torch.bfloat16)
    experts["task3"]["bn.deviation"] = torch.rand(4).bfloat16()
    store = TALLCompress(buffers=("bn.*",)).save(tmp_path / "t.safetensors", base, experts)
    payload = 2 * 6400 + 8 * 6400 // 8 + 8 * 2 * 4
    assert payload < (tmp_path / "t.safetensors").stat().st_size < payload + 3000
    rows = torch.stack([e["w"].double() - base["w"].double() for e in experts.values()])
    total = rows.sum(0)
    rebuilt = store.expert("task3", base)
    mask = rows[3].abs() > 0.4 * (total - rows[3]).abs()
    # one rounding of the sum, one of the result: bfloat16 has eight bits
    expected = base["w"].double() + mask * total
    error = (rebuilt["w"].double() - expected).abs()
    assert (error <= 2**-8 * (total.abs() + expected.abs())).all()
    assert torch.equal(rebuilt["bn.deviation"], experts["task3"]["bn.deviation"])


def test_errors(tmp_path):
    base, experts, store = saved(tmp_path)
    with pytest.raises(ValueError, match="no expert 'x'; the file holds task0, task1, task2"):
        store.expert("x", base)
    with pytest.raises(ValueError, match=r"no parameter 'a.w' of shape \(2, 2\)"):
        store.expert("task0", {"a.w": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="unknown tasks: x"):
        TALLCompress(thresholds={"x": 0.1}).save(tmp_path / "u", base, experts)
    with pytest.raises(ValueError, match="at least 0, found -1"):
        TALLCompress(threshold=-1.0)
    save_file({"a": torch.zeros(1)}, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match="holds no masked experts"):
        MaskedExperts(tmp_path / "f.safetensors")
    experts["task0"]["a.w"][0, 0] = float("inf")
    with pytest.raises(ValueError, match="expert 'task0': parameter 'a.w'"):
        TALLCompress().save(tmp_path / "v.safetensors", base, experts)


def test_buffers_of_a_network_are_stored_whole():
    told = knowing_buffers(TALLCompress(buffers=("a.*",)), ["norm[0].scale"])
    assert told == TALLCompress(buffers=("a.*", "norm[[]0].scale"))
    assert knowing_buffers(TSVCompress(), ["norm.scale"]) == TSVCompress()
