import pytest
import torch
from safetensors.torch import save_file

from lightning_merge.methods import (
    TIES,
    AdaMerging,
    Average,
    Coefficient,
    Fisher,
    GreedySoup,
    OutputProjection,
    RegMean,
    TaskArithmetic,
)
from lightning_merge.methods.plan import peak_entries, plan, plan_with_data
from lightning_merge.states import LazyStateDict
from tests.methods.calibrated import setting
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


LEFT = {  # what is known of a network with batch norms, and of one with layer norms and tokens
    "resnet": {
        Fisher(samples=2): {"running_mean", "running_var", "num_batches_tracked"},
        GreedySoup(samples=4): {"num_batches_tracked"},
        AdaMerging(steps=1, batch_size=2): {"running_mean", "running_var", "num_batches_tracked"},
        RegMean(): {"running_mean", "running_var", "num_batches_tracked", "weight", "bias"},
        OutputProjection(num_folds=None): {"num_batches_tracked"},
        OutputProjection(num_folds=None, mode="parallel"): {
            "running_mean", "running_var", "num_batches_tracked",
        },
    },
    "vit": {
        Fisher(samples=2): set(),
        RegMean(): {"weight", "bias", "cls_token", "pos_embed"},
        OutputProjection(num_folds=None): {"cls_token", "pos_embed"},
        OutputProjection(num_folds=None, layers=("linear",), fallback=TaskArithmetic()): {
            "weight", "cls_token", "pos_embed",
        },
    },
}  # fmt: skip
CASES = [(kind, method) for kind, methods in LEFT.items() for method in methods]


@pytest.mark.parametrize(
    ("kind", "method"), CASES, ids=[f"{k}-{type(m).__name__}" for k, m in CASES]
)
def test_what_is_planned_without_data_is_what_the_merge_does(kind, method):
    base, experts, calibration = setting(kind, classes=(3, 3), samples=4)
    known = {
        p.name: p.treatment
        for p in plan_with_data(method, base, experts)
        if p.treatment != "unknown"
    }
    assert {name.rpartition(".")[2] for name in known} == LEFT[kind][method]
    solved = getattr(method, "layers", ("linear", "convolution"))
    for name in known:  # no weight of a layer that is solved is among them
        layer = "linear" if base[name].ndim == 2 else "convolution"
        assert base[name].ndim < 2 or not name.endswith("weight") or layer not in solved
    outcome = method.outcome(base, experts, calibration)
    fallback = getattr(method, "fallback", None) or Average()
    plain = {"average": Average(), "fallback": fallback}
    merged = {name: one.merge(base, experts) for name, one in plain.items()}
    for name, treatment in known.items():
        assert outcome.treatments[name] == treatment
        expected = base if treatment == "base" else merged[treatment]
        torch.testing.assert_close(outcome.state[name], expected[name])
