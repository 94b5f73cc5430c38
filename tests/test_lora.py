import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lightning_merge.functional.lora import lora_factors, sum_factors
from lightning_merge.functional.spectral import polar_and_values
from lightning_merge.functional.tsv import merge_factors, tsv_merge
from lightning_merge.lora import LoRAExpert
from lightning_merge.methods import TaskArithmetic, TSVMerge

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
