import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_merge.functional import interference
from lightning_merge.functional.interference import interference_sums, singular_cost
from lightning_merge.methods import TIES, Average, IsoC, TSVMerge
from lightning_merge.methods.interference import affordable_matrices, merge_report
from lightning_merge.methods.plan import plan_plainly
from tests.methods.models import models

SHAPES = {
    "stem.weight": (4, 3),
    "blocks.0.fc.weight": (6, 4),
    "blocks.0.fc.bias": (6,),
    "blocks.1.fc.weight": (5, 5),
    "blocks.1.norm.running_var": (5,),
    "empty": (0, 5),
}


@given(num=st.integers(1, 4), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_against_numpy(num, size, seed):
    rng = np.random.default_rng(seed)
    vectors, base = rng.integers(-1, 2, (num, size)).astype(np.float32), rng.normal(size=size)
    found = interference_sums(torch.tensor(base), torch.tensor(vectors)).ratios()
    norms = np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(found.norms, norms)
    np.testing.assert_allclose(found.relative_norms, norms / np.linalg.norm(base))
    for i in range(num):
        for j in range(num):
            both = norms[i] * norms[j]
            cosine = vectors[i] @ vectors[j] / both if both else 0.0
            assert found.cosines[i][j] == pytest.approx(cosine, abs=1e-6)
    pairs = [(vectors[i], vectors[j]) for i in range(num) for j in range(i)]
    shared = sum(int(((a != 0) & (b != 0)).sum()) for a, b in pairs)
    differ = sum(int((a * b < 0).sum()) for a, b in pairs)
    assert found.sign_conflict == differ / max(1, shared)
    assert found.singular is None


@given(num=st.integers(1, 3), cut=st.integers(0, 12), seed=st.integers(0, 99))
def test_sums_of_the_parts_are_those_of_the_whole(num, cut, seed):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(12, generator=generator)
    vectors = torch.randn(num, 12, generator=generator).mul(2).round()
    parts = [interference_sums(base[s], vectors[:, s]) for s in (slice(cut), slice(cut, None))]
    whole = interference_sums(base, vectors).ratios()
    found = (parts[0] + parts[1]).ratios()
    np.testing.assert_allclose(found.norms, whole.norms)
    np.testing.assert_allclose(found.cosines, whole.cosines)
    assert found.sign_conflict == whole.sign_conflict


def test_blocks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    base, vectors = torch.randn(7, 5, generator=generator), torch.randn(3, 7, 5)
    whole = interference_sums(base, vectors).ratios()
    monkeypatch.setattr(interference, "BLOCK", 4)
    cut = interference_sums(base, vectors).ratios()
    np.testing.assert_allclose(cut.cosines, whole.cosines)
    assert cut.sign_conflict == whole.sign_conflict


def test_singular_interference_of_orthogonal_and_equal_tasks():
    eye = torch.eye(6)
    apart = torch.stack([eye[:, [i]] @ eye[[i]] for i in range(2)])
    one = torch.ones(6, 6)
    assert interference_sums(one, apart).ratios().singular == pytest.approx(0, abs=1e-12)
    same = apart[:1].expand(2, -1, -1)
    assert interference_sums(one, same).ratios().singular == pytest.approx(1.0)
    assert interference_sums(one, same, singular=False).ratios().singular is None
    nothing = interference_sums(torch.zeros(6, 6), torch.zeros(2, 6, 6)).ratios()
    assert nothing.relative_norms == [0.0, 0.0]
    assert nothing.singular == 0.0


def test_report_of_a_model():
    base, experts = models(3, shapes=SHAPES)
    base["steps"] = torch.tensor(1)
    for expert in experts.values():
        expert["steps"] = torch.tensor(2)
    report = merge_report(base, experts, TSVMerge(exclude=("stem.*",), otherwise="base"))
    table = {row["layer"]: row for row in report.table()}
    assert set(table) == set(SHAPES) - {"blocks.1.norm.running_var"}
    for name, row in table.items():
        vectors = [np.asarray(expert[name] - base[name]).ravel() for expert in experts.values()]
        np.testing.assert_allclose(row["norms"], [np.linalg.norm(v) for v in vectors], rtol=1e-4)
        assert row["entries"] == base[name].numel()
        for measure in ("singular_interference", "condition"):
            assert (measure in row) == (base[name].ndim == 2 and name != "empty")
    whole = np.concatenate(
        [[np.asarray(e[n] - base[n]).ravel() for e in experts.values()] for n in table], axis=1
    )
    total = report.total()
    assert total["condition"] == max(row.get("condition", 0) for row in table.values()) > 1
    np.testing.assert_allclose(total["norms"], np.linalg.norm(whole, axis=1), rtol=1e-4)
    unit = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    np.testing.assert_allclose(total["cosines"], (unit @ unit.T)[np.triu_indices(3, 1)], rtol=1e-3)
    assert total["cosine"]["highest"] == max(total["cosines"])
    fallback = report.fallback()
    assert fallback["mean"]["names"] == ["blocks.0.fc.bias", "empty"]
    assert fallback["average"]["names"] == ["blocks.1.norm.running_var"]
    assert fallback["base"] == {"parameters": 2, "entries": 13, "names": ["stem.weight", "steps"]}


@pytest.mark.filterwarnings("ignore:TSVMerge. 1 matrices")
@pytest.mark.parametrize("method", [IsoC(scale=0.5), TSVMerge(scale=0.5), TIES(scale=0.5)])
def test_fallback_says_what_the_merge_does(method):
    base, experts = models(3, shapes={"fc.weight": (7, 5), "fc.bias": (7,), "thin.weight": (2, 9)})
    merged = method.merge(base, experts)
    mean = {n: sum(e[n] - base[n] for e in experts.values()) / 3 for n in base}
    means = {n for n in base if torch.allclose(merged[n], base[n] + 0.5 * mean[n], atol=1e-6)}
    fallback = merge_report(base, experts, method).fallback()
    assert means == set(fallback.get("mean", {}).get("names", []))


def test_large_models_are_grouped_by_block():
    shapes = {f"blocks.{i}.fc{j}.weight": (3, 2) for i in range(30) for j in range(2)}
    report = merge_report(*models(2, shapes=shapes), Average())
    names = [row["layer"] for row in report.layers(most=48)]
    assert sorted(names) == sorted(f"blocks.{i}" for i in range(30))
    assert all(row["parameters"] == 2 for row in report.layers(most=48))
    assert len(report.layers(most=60)) == len(report.table()) == 60
    assert [row["layer"] for row in report.layers(most=10)] == ["blocks"]
    assert len(str(report.as_dict())) < 20_000


def test_the_order_of_the_network():
    base, experts = models(2, shapes={"b.weight": (3, 2), "a.weight": (3, 2), "c.weight": (2, 2)})
    report = merge_report(base, experts).in_order(["c.weight", "b.weight", "a.weight", "head.w"])
    assert [row["layer"] for row in report.layers()] == ["c", "b", "a"]


def test_many_tasks_have_no_list_of_pairs():
    total = merge_report(*models(9, shapes={"w": (3, 2)})).total()
    assert "cosines" not in total
    assert len(total["norms"]) == 9


def test_singular_directions_within_a_budget():
    shapes = {f"w{i}": (8, 8) for i in range(6)}
    base, experts = models(2, shapes=shapes)
    planned = plan_plainly(base, experts)
    one = singular_cost((8, 8), 2)
    assert singular_cost((8,), 2) == singular_cost((1, 8), 2) == singular_cost((8, 8, 3, 3), 2) == 0
    assert len(affordable_matrices(planned, 2, 6 * one)) == 6
    assert affordable_matrices(planned, 2, 3 * one) == {"w0", "w2", "w4"}
    assert affordable_matrices(planned, 2, 0.5 * one) == set()
    report = merge_report(base, experts, budget=3 * one)
    assert sum("singular_interference" in row for row in report.table()) == 3


def test_messages_about_unfit_experts():
    base, experts = models(2, shapes={"a.w": (5, 4), "b.w": (4, 4), "b.bias": (4,)})
    fine = merge_report(base, experts)
    assert fine.strangers() == fine.unmoved() == []
    other, _ = models(1, seed=50, shapes={"a.w": (5, 4), "b.w": (4, 4), "b.bias": (4,)})
    (message,) = merge_report(base, {**experts, "other": other}).strangers()
    assert message.startswith("expert 'other' is implausibly far from the base (median relative")
    (message,) = merge_report(base, {**experts, "same": base}).unmoved()
    assert "expert 'same' is the base itself" in message
    (message,) = merge_report(base, {"a": base, "b": base}).unmoved()
    assert message == "no expert differs from the base, so the merge is the base itself."
