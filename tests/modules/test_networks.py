import pytest
import timm
from torch import nn

from lightning_merge.modules.networks import create_timm, set_num_classes, timm_head


def test_unknown_models_and_arguments_are_explained():
    with pytest.raises(ValueError, match=r"timm cannot create 'resnet19' .*similar ones: res"):
        create_timm("resnet19", {}, False, 3)
    with pytest.raises(ValueError, match=r"timm cannot create 'resnet18' with {'wheels': 4}"):
        create_timm("resnet18", {"wheels": 4}, False, 3)


def test_the_classifier_is_the_head():
    assert timm_head(timm.create_model("convnext_atto")) == "head.fc"
    with pytest.raises(ValueError, match=r"classifier \('head', 'head_dist'\), expected one"):
        timm_head(timm.create_model("deit_tiny_distilled_patch16_224"))


def test_only_the_last_linear_layer_of_a_head_changes_and_only_if_it_must():
    head = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 7, bias=False))
    network = nn.ModuleDict({"body": nn.Linear(3, 4), "head": head})
    first, last = head[0], head[2]
    set_num_classes(network, "head", 7)
    assert head[2] is last
    set_num_classes(network, "head", 2)
    assert head[0] is first
    assert (head[2].in_features, head[2].out_features, head[2].bias) == (5, 2, None)


def test_a_head_that_is_a_linear_layer_is_replaced():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    set_num_classes(network, "1", 2)
    assert network[1].out_features == 2


def test_a_head_needs_a_linear_layer():
    with pytest.raises(ValueError, match="the head '1' .* has no nn.Linear"):
        set_num_classes(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "1", 2)
