import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lightning_merge import ExpertPool
from lightning_merge.functional.lora import lora_factors, sum_factors
from lightning_merge.functional.spectral import polar_and_values
from lightning_merge.functional.tsv import merge_factors, tsv_merge
from lightning_merge.lora import LoRAExpert, merge_adapters
from lightning_merge.methods import (
    DARE,
    TIES,
    Average,
    Coefficient,
    IsoC,
    IsoCTS,
    TaskArithmetic,
    TSVMerge,
)
from lightning_merge.methods.plan import plan
from tests.networks import make, tuned

BASE = {"net.fc.weight": torch.randn(12, 9), "net.fc.bias": torch.randn(12)}


def save_adapter(folder, seed=0, module="fc", **config):
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(s, generator=generator) for s in ((12, 2), (2, 9)))
    folder.mkdir(exist_ok=True)
    names = [f"base_model.model.{module}.lora_{x}.weight" for x in "AB"]
    save_file(dict(zip(names, (down, up), strict=True)), folder / "adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return up, down


def test_any_method_takes_adapters(tmp_path):
    updates = [save_adapter(tmp_path / str(t), seed=t) for t in range(2)]
    experts = {str(t): LoRAExpert(tmp_path / str(t), BASE, prefix="net.") for t in range(2)}
    merged = TaskArithmetic(scale=0.5).merge(BASE, experts)
    expected = BASE["net.fc.weight"] + 0.5 * 4 * sum(up @ down for up, down in updates)
    torch.testing.assert_close(merged["net.fc.weight"], expected)
    assert torch.equal(merged["net.fc.bias"], BASE["net.fc.bias"])
    assert len(experts["0"]) == len(list(experts["0"])) == 2
    merged = TSVMerge().merge(BASE, experts)
    factors = [lora_factors(*expert.factors("net.fc.weight")) for expert in experts.values()]
    expected = BASE["net.fc.weight"] + merge_factors(factors).float()
    torch.testing.assert_close(merged["net.fc.weight"], expected, atol=1e-3, rtol=1e-4)


def test_rank_stabilized_scaling(tmp_path):
    up, down = save_adapter(tmp_path, use_rslora=True)
    found = LoRAExpert(tmp_path, BASE, prefix="net.")["net.fc.weight"]
    torch.testing.assert_close(found, BASE["net.fc.weight"] + 8 / 2**0.5 * up @ down)


@given(m=st.integers(2, 9), n=st.integers(2, 9), rank=st.integers(1, 2), seed=st.integers(0, 99))
def test_factored_route_equals_the_dense_one(m, n, rank, seed):
    rng = np.random.default_rng(seed)
    ups, downs = (
        [torch.tensor(rng.normal(size=s)) for _ in range(2)] for s in ((m, rank), (rank, n))
    )
    dense = torch.stack([up @ down for up, down in zip(ups, downs, strict=True)])
    factors = [lora_factors(up, down) for up, down in zip(ups, downs, strict=True)]
    for one, update in zip(factors, dense, strict=True):
        torch.testing.assert_close(one.product(), update)
    if rank <= min(m, n) // 2:
        whole = tsv_merge(dense, rank)
        torch.testing.assert_close(merge_factors(factors), whole, atol=1e-5, rtol=1e-5)
    total = sum_factors(ups, downs)
    polar, values = polar_and_values(dense.sum(0))
    torch.testing.assert_close(total.values, values, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(total.left @ total.right, polar, atol=1e-4, rtol=1e-4)


def test_errors(tmp_path):
    save_adapter(tmp_path / "a", module="other")
    with pytest.raises(ValueError, match=r"Not in the base: \['net.other.weight'\]"):
        LoRAExpert(tmp_path / "a", BASE, prefix="net.")
    save_adapter(tmp_path / "b", use_dora=True)
    with pytest.raises(ValueError, match="use_dora cannot be read"):
        LoRAExpert(tmp_path / "b", BASE, prefix="net.")
    (tmp_path / "b" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable adapter config"):
        LoRAExpert(tmp_path / "b", BASE, prefix="net.")


SHAPES = {
    "net.n": (),  # the type checker of the tests looks at the first entry of every mapping
    "net.a.weight": (13, 9),
    "net.qkv.weight": (12, 7),
    "net.conv.weight": (6, 3, 3, 3),
    "net.left.weight": (5, 4),
    "net.a.bias": (13,),
}
TARGETS = {"a": {"a": 1, "qkv": 3, "conv": 2}, "b": {"a": 4, "qkv": 2}, "c": {"qkv": 1, "conv": 3}}
"""Rank of every module that a task adapts; no task adapts net.left."""


@pytest.fixture
def trio(tmp_path):
    """A float64 base, adapters of odd and different ranks, and the dense experts by the formula."""
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator).double() for n, s in SHAPES.items()}
    base["net.steps"] = torch.tensor(3)
    dense = {}
    for task, ranks in TARGETS.items():
        rslora, alphas = task == "b", {"qkv": 5.0} if task == "c" else {}
        tensors, expert = {}, dict(base)
        for module, rank in ranks.items():
            m, *n = SHAPES[f"net.{module}.weight"]
            kernel = n[1:] and [1] * len(n[1:])
            up = torch.randn(m, rank, *kernel, generator=generator)
            down = torch.randn(rank, *n, generator=generator)
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            scale = alphas.get(module, 6.0) / (rank**0.5 if rslora else rank)
            update = up.flatten(1).double() @ down.flatten(1).double()
            name = f"net.{module}.weight"
            expert[name] = base[name] + scale * update.view(base[name].shape)
        folder = tmp_path / task
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"r": 4, "rank_pattern": ranks, "lora_alpha": 6, "alpha_pattern": alphas}
        (folder / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": rslora}))
        dense[task] = expert
    return base, {task: tmp_path / task for task in TARGETS}, dense


FACTORED = [
    Average(),
    Average(weights={"a": 3.0, "b": 1.0, "c": -1.0}),
    TaskArithmetic(scale=0.7),
    TaskArithmetic(weights={"c": 2.0, "a": 1.0, "b": -1.0}, normalize=True),
    TSVMerge(),
    TSVMerge(convolutions="matrix", scale=0.9, split={"*.qkv.weight": 3}),
    TSVMerge(energy=0.9),
    IsoC(scale=1.2),
    IsoC(convolutions="matrix", split={"*.qkv.weight": 3}),
    IsoCTS(scale=1.2),
    IsoCTS(common_fraction=0.3, convolutions="matrix", split={"*.qkv.weight": 3}),
    IsoCTS(common_fraction=0.0),
    IsoCTS(common_fraction=1.0),
    TaskArithmetic(coefficients=(Coefficient(value=-0.5, task="b", pattern="*.a.*"),)),
    TSVMerge(exclude=("*.a.weight",), otherwise="base"),
]


@pytest.mark.parametrize("method", FACTORED, ids=lambda method: type(method).__name__)
def test_adapters_merge_as_their_dense_experts_without_forming_them(method, trio, monkeypatch):
    base, adapters, dense = trio
    expected = method.merge(base, dense)
    formed, get = [], LoRAExpert.__getitem__
    monkeypatch.setattr(LoRAExpert, "__getitem__", lambda s, n: formed.append(n) or get(s, n))
    merged = merge_adapters(base, adapters, method)
    assert list(merged) == list(base)
    for name in base:
        torch.testing.assert_close(merged[name], expected[name], atol=1e-6, rtol=1e-6)
    matrices = {name for name in formed if base[name].ndim >= 2}
    assert matrices <= {"net.a.weight"} if method.exclude else not matrices


@pytest.mark.parametrize("method", [TIES(), IsoC(rank_tol=0.0), DARE(density=0.5)])
def test_other_methods_take_the_dense_route(method, trio):
    base, adapters, dense = trio
    expected = method.merge(base, dense)
    if method == IsoC(rank_tol=0.0):  # directions beyond the rank are arbitrary
        expected = {n: v for n, v in expected.items() if n in ("net.n", "net.left.weight")}
    merged = merge_adapters(base, adapters, method)
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-5)


def test_a_plan_forms_no_product(trio, monkeypatch):
    base, adapters, _ = trio
    experts = {task: LoRAExpert(path, base) for task, path in adapters.items()}
    monkeypatch.setattr(LoRAExpert, "__getitem__", lambda s, n: base[n])
    monkeypatch.setattr(LoRAExpert, "factors", lambda s, n: pytest.fail(n))
    assert len(plan(TSVMerge(), base, experts)) == len(base)


def test_half_precision_base_rounds_once(trio):
    base, adapters, dense = trio
    half = {n: v.bfloat16() if v.is_floating_point() else v for n, v in base.items()}
    merged = merge_adapters(half, adapters, TaskArithmetic(scale=1.0))
    update = sum(dense[t]["net.a.weight"] - base["net.a.weight"] for t in dense)
    expected = (half["net.a.weight"].double() + update).bfloat16()
    assert merged["net.a.weight"].dtype == torch.bfloat16
    assert torch.equal(merged["net.a.weight"], expected)


def test_transposed_layers_and_parameters_saved_whole(tmp_path):
    up, down = save_adapter(tmp_path, fan_in_fan_out=True)
    path = tmp_path / "adapter_model.safetensors"
    tensors = dict(load_file(path))
    tensors["base_model.model.fc.bias"] = torch.full((9,), 2.0)
    tensors["base_model.model.classifier.weight"] = torch.ones(3, 9)
    save_file(tensors, path)
    base = {"fc.weight": torch.randn(9, 12), "fc.bias": torch.zeros(9)}
    expert = LoRAExpert(path, base)  # the file will do
    torch.testing.assert_close(expert["fc.weight"], base["fc.weight"] + 4 * (up @ down).T)
    assert torch.equal(expert["fc.bias"], torch.full((9,), 2.0))
    assert list(expert.others()) == ["classifier.weight"]
    merged = merge_adapters(base, {"a": path, "b": tmp_path}, Average())
    assert torch.equal(merged["fc.bias"], torch.full((9,), 2.0))


def test_a_pool_takes_an_adapter(tmp_path):
    base = make("mlp")[0]
    pool = ExpertPool.create(tmp_path / "pool", base, "net.9")
    folder = tmp_path / "adapter"
    folder.mkdir()
    up, down = torch.randn(8, 3), torch.randn(3, 6)
    tensors = {
        "base_model.model.net.0.lora_A.weight": down,
        "base_model.model.net.0.lora_B.weight": up,
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 0.3}))
    with pytest.raises(ValueError, match="no parameters below its head.*head=\\."):
        pool.add("a", folder)
    pool.add("a", folder, head=torch.nn.Linear(8, 5))
    assert pool.head_state("a")["weight"].shape == (5, 8)
    expected = base.net[0].weight + 0.1 * up @ down
    torch.testing.assert_close(pool.expert("a")["net.0.weight"], expected)
    # as peft saves a head that it trains too
    tensors |= {f"base_model.model.net.9.{n}": v for n, v in base.net[9].state_dict().items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    pool.add("b", str(folder / "adapter_model.safetensors"))
    assert torch.equal(pool.head_state("b")["weight"], base.net[9].weight)
    pool.add("c", tuned(base, 0))
    assert pool.tasks == ["a", "b", "c"]


def test_adapters_that_do_not_fit(tmp_path):
    save_adapter(tmp_path)
    with pytest.raises(ValueError, match=r"shapes differ.*'fc.weight' \(12, 9\) vs \(9, 12\)"):
        LoRAExpert(tmp_path, {"fc.weight": torch.zeros(9, 12)})
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({"base_model.model.fc.bias": torch.zeros(12)}, path)
    with pytest.raises(ValueError, match="holds no pair of lora_A and lora_B"):
        LoRAExpert(tmp_path, BASE)
    save_file({**tensors, "base_model.model.e.lora_embedding_A": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="not plain pairs.*lora_embedding_A"):
        LoRAExpert(tmp_path, BASE)
    tensors["base_model.model.fc.lora_A.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ValueError, match="'a': parameter 'net.fc.weight' holds 1 non-finite"):
        merge_adapters(BASE, {"a": tmp_path}, TSVMerge())
