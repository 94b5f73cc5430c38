import pytest
import torch
from safetensors.torch import save_file

from lightning_merge.methods import TIES, Coefficient, TaskArithmetic
from lightning_merge.methods.plan import peak_entries, plan
from lightning_merge.states import LazyStateDict
from tests.methods.models import models


def test_plan_says_what_the_merge_does(tmp_path):
    base, experts = models(2, shapes={"a.w": (3, 2), "b.w": (4,), "bn.running_var": (5,)})
    base["tied"], base["n"] = base["a.w"], torch.tensor(1)
    for expert in experts.values():
        expert["tied"], expert["n"] = expert["a.w"], torch.tensor(2)
    method = TaskArithmetic(
        exclude=("b.*",), coefficients=(Coefficient(value=0.5, task="task1", pattern="a.*"),)
    )
    planned = {p.name: p for p in plan(method, base, experts)}
    assert list(planned) == list(base)
    assert planned["a.w"].treatment == "method"
    assert planned["a.w"].coefficients == (1.0, 0.5)
    assert (planned["a.w"].shape, planned["a.w"].size) == ((3, 2), 6)
    assert (planned["b.w"].treatment, planned["b.w"].coefficients) == ("average", ())
    assert planned["bn.running_var"].treatment == "average"
    assert planned["n"].treatment == "base"
    assert planned["tied"].tied_to == "a.w"
    assert peak_entries(list(planned.values()), 2) == 4 * 6
    assert peak_entries([], 2) == 0


def test_plan_reads_no_value(tmp_path, monkeypatch):
    base, _ = models(1)
    save_file(base, tmp_path / "x.safetensors")
    lazy = LazyStateDict(tmp_path / "x.safetensors")
    read, get = set(), LazyStateDict.__getitem__
    monkeypatch.setattr(LazyStateDict, "__getitem__", lambda s, n: read.add(n) or get(s, n))
    assert len(plan(TIES(), lazy, {"a": lazy})) == len(base)
    assert len(read) <= 1  # the type checker of the tests looks at one entry of every mapping


def test_plan_raises_what_the_merge_would():
    base, experts = models(1)
    with pytest.raises(ValueError, match="not in the base: extra"):
        plan(TIES(), base, {"a": {**experts["task0"], "extra": torch.zeros(1)}})
    with pytest.raises(ValueError, match="matches no parameter"):
        plan(TIES(coefficients=(Coefficient(value=1.0, pattern="x"),)), base, experts)
