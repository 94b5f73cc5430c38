"""Same inputs through mergekit's kernels; each option is where its definition differs from ours."""

from types import SimpleNamespace

import pytest
import torch

from lightning_merge.functional.breadcrumbs import breadcrumbs
from lightning_merge.functional.slerp import slerp
from lightning_merge.functional.ties import trim
from lightning_merge.methods import (
    TIES,
    Average,
    Breadcrumbs,
    Coefficient,
    ModelStock,
    TaskArithmetic,
)
from tests.methods.models import models

pytestmark = pytest.mark.parity
REASON = "mergekit is not installed: pip install lightning-merge[peers]"
SHAPES = {"a.weight": (24, 20), "b.bias": (12,), "c.weight": (7, 11)}


@pytest.fixture
def sparsify():
    return pytest.importorskip("mergekit.sparsify", reason=REASON)


@pytest.fixture
def arithmetic():
    return pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic", reason=REASON)


def merged_by_sign(arithmetic, deltas, scale):
    """mergekit's consensus: plus where the sum is zero, the mean of the agreeing."""
    mask = arithmetic.get_mask(deltas, method="sum")
    divisor = mask.sum(dim=0)
    divisor[divisor == 0] = 1
    return scale * (deltas * mask).sum(dim=0) / divisor


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_trim_by_tensor_rounds_down(sparsify, density):
    base, experts = models(3, shapes=SHAPES)
    for name, value in base.items():
        rows = torch.stack([expert[name] - value for expert in experts.values()])
        theirs = torch.stack([sparsify.magnitude(row, density) for row in rows])
        assert torch.equal(trim(rows, density, "floor"), theirs)


def test_ties_with_all_entries_kept(arithmetic):
    base, experts = models(3, shapes=SHAPES)
    ours = TIES(density=1.0, scope="tensor", zero_sign="positive", scale=0.8)
    merged = ours.merge(base, experts)
    for name, value in base.items():
        rows = torch.stack([expert[name] - value for expert in experts.values()])
        expected = value + merged_by_sign(arithmetic, rows, 0.8)
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=0)


def test_ties_by_tensor(sparsify, arithmetic):
    base, experts = models(3, shapes=SHAPES)
    ours = TIES(density=0.4, scope="tensor", zero_sign="positive", count="floor")
    merged = ours.merge(base, experts)
    for name, value in base.items():
        rows = torch.stack(
            [sparsify.magnitude(expert[name] - value, 0.4) for expert in experts.values()]
        )
        # a trimmed entry has sign 0 there, so it neither agrees nor counts
        expected = value + merged_by_sign(arithmetic, rows, 1.0)
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_with_unequal_weights(arithmetic, sparsify, normalize):
    peer = arithmetic.GeneralizedTaskArithmeticMerge(
        consensus_method=arithmetic.ConsensusMethod.sum,
        sparsification_method=sparsify.SparsificationMethod.magnitude,
        default_normalize=True,
        default_rescale=False,
        method_name="ties",
        method_pretty_name=None,
        method_reference_url=None,
    )
    base, experts = models(3, shapes=SHAPES)
    weights = (0.2, 0.5, 1.0)
    merged = TIES(
        density=0.5,
        scope="tensor",
        zero_sign="positive",
        count="floor",
        combine="mean" if normalize else "sum",
        weights=dict(zip(experts, weights, strict=True)),
        scale=0.8,
    ).merge(base, experts)
    options = {"normalize": normalize, "rescale": False, "int8_mask": False, "lambda": 0.8}
    options |= {"weight": dict(enumerate(weights)), "density": dict.fromkeys(range(3), 0.5)}
    for name in base:
        theirs = peer.merge_group(group_of(base, experts, name), **options)
        torch.testing.assert_close(merged[name], theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("density", "drop_top"), [(0.5, 0.1), (0.25, 0.0), (0.75, 0.25)])
def test_breadcrumbs_where_the_shares_are_whole_numbers(sparsify, density, drop_top):
    base, experts = models(2, shapes={"w": (20, 4)})
    rows = [expert["w"] - base["w"] for expert in experts.values()]
    theirs = [sparsify.magnitude_outliers(row, density, gamma=drop_top) for row in rows]
    for row, expected in zip(rows, theirs, strict=True):
        assert torch.equal(breadcrumbs(row, density, drop_top), expected)
    merged = Breadcrumbs(density=density, drop_top=drop_top).merge(base, experts)["w"]
    torch.testing.assert_close(merged, base["w"] + 0.3 * sum(theirs), atol=1e-6, rtol=0)


def test_task_arithmetic(arithmetic):
    peer = arithmetic.GeneralizedTaskArithmeticMerge(
        consensus_method=None,
        sparsification_method=None,
        default_normalize=False,
        default_rescale=False,
        method_name="task_arithmetic",
        method_pretty_name=None,
        method_reference_url=None,
    )
    base, experts = models(3, shapes=SHAPES)
    merged = TaskArithmetic(scale=0.3).merge(base, experts)
    for name in base:
        weights = dict.fromkeys(range(3), 1.0)
        options = {"weight": weights, "normalize": False, "lambda": 0.3}
        theirs = peer.merge_group(group_of(base, experts, name), **options)
        torch.testing.assert_close(merged[name], theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("unit", ["tensor", "row"])
def test_model_stock(unit):
    peer = pytest.importorskip("mergekit.merge_methods.model_stock", reason=REASON)
    base, experts = models(3, shapes=SHAPES)
    for expert in experts.values():  # a common part: cosines of one sign are clipped by neither
        for name, value in expert.items():
            value += 0.3 * (1 + base[name].abs())
    merged = ModelStock(unit=unit).merge(base, experts)
    for name in base:
        group = group_of(base, experts, name)
        theirs = peer.model_stock_merge_method.merge_group(group, filter_wise=unit == "row")
        torch.testing.assert_close(merged[name], theirs.view(merged[name].shape), atol=1e-6, rtol=0)


def group_of(base, experts, name):
    """What mergekit's methods take, as far as they look at it."""
    entries = [SimpleNamespace(id=i, tensor=e[name]) for i, e in enumerate(experts.values())]
    return SimpleNamespace(base=SimpleNamespace(tensor=base[name]), non_base=entries)


def test_slerp():
    peer = pytest.importorskip("mergekit.merge_methods.slerp", reason=REASON)
    _, experts = models(2, shapes=SHAPES, step=5.0)
    first, second = experts.values()
    for name in SHAPES:
        # interpolates each entry of the first axis on its own
        pair = (state[name].reshape(1, -1) for state in (first, second))
        theirs = peer.slerp(torch.tensor([0.3]), *pair)
        ours = slerp(first[name], second[name], 0.3).reshape(1, -1)
        torch.testing.assert_close(ours, theirs.reshape(1, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear(normalize, dtype):
    peer = pytest.importorskip("mergekit.merge_methods.linear", reason=REASON)
    base, experts = models(3, shapes=SHAPES, dtype=dtype)
    weights = dict(zip(experts, (0.2, 1.7, -0.4), strict=True))
    if normalize:
        merged = Average(weights=weights).merge(base, experts)
    else:  # a sum of weights is task arithmetic from a base of zeros
        rules = tuple(Coefficient(value=w, task=task) for task, w in weights.items())
        zeros = {name: torch.zeros_like(value) for name, value in base.items()}
        merged = TaskArithmetic(scale=1.0, coefficients=rules).merge(zeros, experts)
    for name in SHAPES:
        batch = SimpleNamespace(tensors=[e[name][None] for e in experts.values()])
        given = torch.tensor([list(weights.values())])
        theirs = peer.linear_merge.merge_batch(batch, weight=given, normalize=normalize)
        precision = {torch.bfloat16: 1e-2}.get(dtype, 1e-6)
        torch.testing.assert_close(merged[name], theirs[0], atol=precision, rtol=precision)
