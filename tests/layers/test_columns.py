import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_merge.layers.capture import hooked
from lightning_merge.layers.collecting import Collecting
from lightning_merge.layers.columns import by_sample, input_columns, unfold
from lightning_merge.layers.sites import find_sites
from lightning_merge.layers.statistics import LayerSums, Sampling, pick, real_tokens
from lightning_merge.layers.tracing import trace
from lightning_merge.merging import calibration_for
from lightning_merge.methods import Average
from lightning_merge.methods.layerwise import LayerWalk
from tests.layers.networks import Tokens, experts_of

KINDS = ("linear", "convolution", "attention", "norm", "embedding")


@given(
    dims=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same"]),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
)
def test_patches_times_the_weight_are_the_layers_output(
    dims, groups, kernel, stride, dilation, padding, mode
):
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    stride = 1 if padding == "same" else stride
    layer = make(4, 6, kernel, stride, padding, dilation, groups, True, mode).double()
    x = torch.randn(2, 4, *(7, 6, 5)[:dims], dtype=torch.float64)
    patches = unfold(layer, x)
    weight = layer.weight.reshape(groups, 6 // groups, -1)
    found = torch.einsum("nlgi,goi->ngol", patches, weight)
    expected = layer(x)
    found = found.reshape(2, 6, *expected.shape[2:]) + layer.bias.view(1, 6, *[1] * dims)
    torch.testing.assert_close(found, expected)


class ChannelsFirst(nn.LayerNorm):
    """As timm's LayerNorm2d."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Activated(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.LayerNorm(5), (3, 4, 5), -1),
        (ChannelsFirst(5), (3, 5, 5, 5), 1),
        (nn.GroupNorm(2, 6), (3, 6, 4), 1),
        (nn.BatchNorm2d(4), (3, 4, 2, 4), 1),
        (nn.RMSNorm(5), (3, 5), -1),
    ],
)
def test_norms_are_scale_times_columns_plus_shift(layer, shape, axis):
    layer = layer.double().eval()
    nn.init.normal_(layer.weight)
    bias = getattr(layer, "bias", None)
    if bias is not None:
        nn.init.normal_(bias)
    x = torch.randn(shape, dtype=torch.float64)
    network = nn.ModuleDict({"norm": layer, "head": nn.Linear(1, 1)})
    (site,) = find_sites(network, "head", list(network.state_dict()), KINDS).handled
    columns, owned = input_columns(site, layer, (x,), {}, len(x))
    assert owned
    found = columns * layer.weight + (0 if bias is None else bias)
    expected = layer(x).movedim(axis, -1).reshape(columns.shape)
    torch.testing.assert_close(found, expected)


def test_a_norm_with_an_activation_inside_is_left_out_with_its_reason():
    layer = Activated(5).eval()
    network = nn.Sequential(nn.Linear(4, 5), layer, nn.LayerNorm(5), nn.Linear(5, 1))
    found = find_sites(network, "3", list(network.state_dict()), KINDS)
    assert [site.name for site in found.handled] == ["0", "1", "2"]
    order = trace(network, found.handled, torch.randn(2, 4))
    assert [site.name for site in order.sites] == ["0", "2"]
    assert order.unused == ()
    kept = found.without(order.refused)
    assert [site.name for site in kept.handled] == ["0", "2"]
    assert kept.told("Average") == (
        "1 layers are merged by Average, without a look at their inputs: 1. Activated does more "
        "than scale and shift its normalised input, such as an activation."
    )
    (site,) = [site for site in found.handled if site.name == "1"]
    with pytest.raises(ValueError, match=r"layer '1' \(Activated\) does more.*take 'norm' out"):
        input_columns(site, layer, (torch.randn(3, 5),), {}, 3)


@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_attention_gives_the_inputs_of_its_four_projections(batch_first):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(6, 2, batch_first=batch_first).double().eval()
    network = nn.ModuleDict({"attention": layer, "head": nn.Linear(1, 1)})
    nn.init.normal_(layer.in_proj_bias)
    nn.init.normal_(layer.out_proj.bias)
    sites = find_sites(network, "head", list(network.state_dict()), KINDS).handled
    assert [s.part for s in sites] == ["q", "k", "v", "out"]
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    given = x if batch_first else x.transpose(0, 1)
    state = network.state_dict()
    inputs = {}
    for site in sites:
        columns, owned = input_columns(site, layer, (given, given, given), {}, 3)
        assert owned
        matrix = site.matrix(state, bias=True)[0]
        ones = columns.new_ones(*columns.shape[:2], 1, 1)
        inputs[site.part] = (torch.cat([columns, ones], -1) @ matrix.T)[:, :, 0]
    heads = [inputs[p].reshape(3, 4, 2, 3).transpose(1, 2) for p in "qkv"]
    attended = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(3, 4, 6)
    columns, _ = input_columns(sites[3], layer, (given, given, given), {}, 3)
    torch.testing.assert_close(columns[:, :, 0], attended)
    output = layer(given, given, given)[0]
    output = output if batch_first else output.transpose(0, 1)
    torch.testing.assert_close(inputs["out"], output)


def test_matrices_are_written_back_where_they_came_from():
    network = Tokens()
    state = {n: v.clone() for n, v in network.state_dict().items()}
    sites = find_sites(network, "head", list(state), KINDS).handled
    kept = {name: value.clone() for name, value in state.items()}
    for site in sites:
        matrix = site.matrix(state, bias=True)
        site.write(state, matrix + 1, bias=True)
    for name, value in state.items():
        expected = kept[name] + (0 if name.startswith("head") else 1)
        torch.testing.assert_close(value, expected)


def test_samples_may_come_first_in_windows_second_or_not_at_all():
    x = torch.randn(3, 4, 5)
    assert torch.equal(by_sample(x, 3)[0], x)
    assert by_sample(torch.randn(6, 4, 5), 3)[0].shape == (3, 8, 5)
    assert torch.equal(by_sample(x.transpose(0, 1), 3)[0], x)
    rows, owned = by_sample(torch.randn(7, 5), 3)
    assert rows.shape == (1, 7, 5)
    assert not owned


@given(st.integers(1, 9), st.integers(0, 99))
def test_drawn_tokens_stand_for_all_and_do_not_depend_on_the_batch(limit, seed):
    columns = torch.randn(6, 7, 2)
    real = torch.rand(6, 7) > 0.3
    sampling = Sampling(num_folds=2, tokens_per_sample=limit, seed=seed)
    whole = pick(columns, True, torch.arange(6), real, sampling)
    assert whole.weights.sum() == pytest.approx(int(real[real.any(1)].sum()))
    kept = whole.keep.view(6, 7)
    assert bool((kept <= real).all())
    assert torch.equal(kept.sum(1), real.sum(1).clamp_max(limit))
    parts = [
        pick(columns[r], True, torch.arange(6)[r], real[r], sampling)
        for r in (slice(0, 2), slice(2, 6))
    ]
    for field in ("keep", "folds", "weights"):
        joined = torch.cat([getattr(p, field) for p in parts])
        assert torch.equal(joined, getattr(whole, field))


def test_masks_are_found_among_named_inputs():
    mask = torch.tensor([[1, 1, 0]])
    assert real_tokens({"input_ids": mask, "attention_mask": mask}).tolist() == [
        [True, True, False]
    ]
    found = real_tokens({"x": mask, "src_key_padding_mask": ~mask.bool()})
    assert found.tolist() == [[True, True, False]]
    assert real_tokens(mask) is None


def test_sums_are_those_of_the_columns_by_fold_and_add():
    network = nn.ModuleDict({"layer": nn.Linear(3, 2), "head": nn.Linear(1, 1)})
    (site,) = find_sites(network, "head", list(network.state_dict()), KINDS).handled
    x = torch.randn(9, 4, 1, 3, dtype=torch.float64)
    r = torch.randn(1, 36, 2, dtype=torch.float64)
    sampling = Sampling(num_folds=3, tokens_per_sample=None)
    picked = pick(x, True, torch.arange(9), None, sampling)

    def sums(rows):
        one = LayerSums(site, (1, 2, 3), num_folds=3, targets=True, residual_gram=True)
        part = pick(x[rows], True, torch.arange(9)[rows], None, sampling)
        flat = x[rows].reshape(1, -1, 3)
        mine = r.view(9, 4, 2)[rows].reshape(1, -1, 2)
        one.add(flat, part, mine, mine)
        return one

    whole = sums(slice(None))
    for name, value in (sums(slice(0, 4)) + sums(slice(4, 9))).tensors().items():
        torch.testing.assert_close(value, whole.tensors()[name], rtol=1e-12, atol=1e-12)
    for fold, found in enumerate(whole.quadratics()):
        chosen = (picked.folds == fold).numpy()
        xs, rs = x.reshape(-1, 3).numpy()[chosen], r[0].numpy()[chosen]
        np.testing.assert_allclose(found.gram[0].numpy(), xs.T @ xs)
        np.testing.assert_allclose(found.cross[0].numpy(), rs.T @ xs)
        np.testing.assert_allclose(found.residual_gram[0].numpy(), rs.T @ rs)
        assert found.energy == pytest.approx((rs**2).sum())


def test_hooks_come_off_after_success_failure_and_an_early_end():
    network = Tokens().eval()
    sites = find_sites(network, "head", list(network.state_dict()), KINDS).handled
    ids = torch.zeros(2, 5, dtype=torch.int64)
    seen = []

    def receive(site, columns, owned):
        seen.append(site.name)

    with hooked(network, sites, receive, samples=2):
        network(ids)
    assert "blocks.1.self_attn.out_proj" in seen
    seen.clear()
    with hooked(network, sites, receive, samples=2, calls=1):
        network(ids)
        pytest.fail("the pass was not ended")
    assert seen == ["embed"]

    def fail(site, columns, owned):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), hooked(network, sites, fail, samples=2):
        network(ids)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_numbers_that_are_not_finite_are_named_and_large_ones_are_none_of_them():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).eval()
    experts = experts_of(network, 2)
    options = Collecting(sampling=Sampling(num_folds=2), bias=True)

    def walk(inputs):
        found = calibration_for(experts, dict.fromkeys(experts, inputs), base=network, head="1")
        return LayerWalk(found.base, found.experts, found.calibration, Average(), KINDS, options)

    largest = torch.finfo(torch.float32).max
    walk(torch.full((8, 2), largest)).expert_statistics()  # their sum is infinite
    for bad in (math.nan, math.inf):
        inputs = torch.zeros(8, 2)
        inputs[5, 1] = bad
        with pytest.raises(ValueError, match="layer '0', task 'task0': the inputs hold NaN or inf"):
            walk(inputs).expert_statistics()
    opposite = torch.tensor([[math.inf, -math.inf]]).expand(8, 2).clone()
    with pytest.raises(ValueError, match="NaN or infinity"):
        walk(opposite).expert_statistics()
