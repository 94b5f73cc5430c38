"""Same inputs through FusionBench; each option is where its definition differs from ours."""

import pytest
import torch

from lightning_merge.methods import (
    TIES,
    AdaMerging,
    Average,
    IsoC,
    IsoCTS,
    TaskArithmetic,
    TSVMerge,
)
from lightning_merge.methods.adaptation.learner import Learner
from lightning_merge.methods.rules import Coefficient
from lightning_merge.networks import load_backbone
from tests.methods.calibrated import setting
from tests.methods.models import models

pytestmark = pytest.mark.parity
REASON = "FusionBench is not installed: pip install lightning-merge[peers]"
SHAPES = {"a.weight": (24, 16), "b.weight": (12, 20), "b.bias": (12,), "pos": (1, 5, 16)}


@pytest.fixture
def peer():
    return pytest.importorskip("fusion_bench", reason=REASON)


def task_vectors(base, experts):
    return [{name: expert[name] - base[name] for name in base} for expert in experts.values()]


def assert_update(merged, base, update, scale, atol):
    for name, value in base.items():
        torch.testing.assert_close(merged[name], value + scale * update[name], atol=atol, rtol=0)


def test_average_and_task_arithmetic(peer):
    from fusion_bench.utils.state_dict_arithmetic import state_dict_avg, state_dict_weighted_sum

    base, experts = models(4, shapes=SHAPES)
    states = list(experts.values())
    zero = {name: torch.zeros_like(value) for name, value in base.items()}
    assert_update(Average().merge(base, experts), zero, state_dict_avg(states), 1.0, 1e-6)
    weights = dict(zip(experts, [0.1, 0.2, 0.3, 0.4], strict=True))
    theirs = state_dict_weighted_sum(states, list(weights.values()))
    assert_update(Average(weights=weights).merge(base, experts), zero, theirs, 1.0, 1e-6)
    theirs = state_dict_weighted_sum(task_vectors(base, experts), [0.3] * 4)
    assert_update(TaskArithmetic(scale=0.3).merge(base, experts), base, theirs, 1.0, 1e-6)


@pytest.mark.parametrize("combine", ["mean", "sum", "max"])
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_ties(peer, combine, density):
    from fusion_bench.method.ties_merging.ties_merging_utils import (
        state_dict_to_vector,
        ties_merging,
        vector_to_state_dict,
    )

    base, experts = models(4, shapes=SHAPES)
    vectors = torch.stack([state_dict_to_vector(v) for v in task_vectors(base, experts)])
    theirs = vector_to_state_dict(ties_merging(vectors, density, combine), base)
    # keeps one entry more than the density says
    ours = TIES(density=density, combine=combine, scale=0.3, count="published")
    assert_update(ours.merge(base, experts), base, theirs, 0.3, 1e-6)


@pytest.mark.parametrize("alphas", [[1.0] * 3, [0.5, 1.0, 2.0]])
def test_tsv_merge(peer, alphas):
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    base, experts = models(3, shapes=SHAPES)
    scaled = [
        {name: alpha * value for name, value in vector.items()}
        for alpha, vector in zip(alphas, task_vectors(base, experts), strict=True)
    ]
    theirs = TSVM_utils.compute_and_sum_svd_mem_reduction(scaled, accelerator="cpu")
    rules = tuple(Coefficient(value=a, task=t) for a, t in zip(alphas, experts, strict=True))
    ours = TSVMerge(scale=0.7, coefficients=rules)
    assert_update(ours.merge(base, experts), base, theirs, 0.7, 1e-5)


def test_iso_c_and_iso_cts(peer):
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts

    base, experts = models(3, shapes=SHAPES)
    theirs = iso_c(task_vectors(base, experts), accelerator="cpu")
    assert_update(IsoC(scale=1.5).merge(base, experts), base, theirs, 1.5, 1e-5)
    theirs = iso_cts(task_vectors(base, experts), 0.6, accelerator="cpu")
    ours = IsoCTS(scale=1.5, common_fraction=0.6)
    assert_update(ours.merge(base, experts), base, theirs, 1.5, 1e-5)


def test_the_gradient_of_an_adamerging_step(peer):
    from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel

    base, experts, calibration = setting("vit", samples=6)
    method = AdaMerging(batch_size=6, max_images_per_forward=7)
    weights, shared, _ = method._prepare(base, experts, calibration)
    groups = tuple(weights.group_of)
    learner = Learner(method, calibration, shared, weights, groups, "")
    generator = torch.Generator().manual_seed(0)
    point = 0.3 + 0.1 * torch.randn(len(groups), 3, generator=generator, dtype=torch.float64)
    weights.write(point)
    ours = learner.sums(0).gradient

    networks = {task: calibration.network(task) for task in experts}
    heads = {task: network.head for task, network in networks.items()}
    origin = calibration.network("task0")
    load_backbone(origin, base, "head")
    for network in (origin, *networks.values()):
        network.head = torch.nn.Identity()
    order = [groups.index(name) for name, _ in origin.named_parameters()]
    start = point[order].T.float().contiguous()
    module = LayerWiseMergedModel(start, origin, list(networks.values()), clamp_weights=False)
    module.merge_weights()
    for task in experts:
        logits = heads[task](module(calibration.inputs[task][slice(None)]))
        scores = logits.log_softmax(1)
        (-(scores.exp() * scores).sum(1).mean()).backward(retain_graph=True)
    theirs = module.merge_weight.grad.T.double()
    error = (ours[order] - theirs).norm() / theirs.norm()
    assert float(error) < 1e-5
