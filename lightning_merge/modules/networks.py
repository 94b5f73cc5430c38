"""Networks of experts: timm models by name, and heads of the size that the data asks for."""

from typing import Any

import timm
from torch import nn

from lightning_merge.networks import first_linear, get_submodule, set_submodule


def create_timm(
    model: str, model_args: dict[str, Any], pretrained: bool | str, num_classes: int
) -> nn.Module:
    """A timm model.

    Args:
        model: Name, with or without a tag of weights (``resnet18.a1_in1k``).
        model_args: More arguments of ``timm.create_model``.
        pretrained: Whether to load timm's weights; a string is the tag of the weights.
        num_classes: Outputs; 0 leaves the head out.

    Raises:
        ValueError: If timm knows no such model, or refuses the arguments.
    """
    name = f"{model.partition('.')[0]}.{pretrained}" if isinstance(pretrained, str) else model
    try:
        return timm.create_model(
            name, pretrained=bool(pretrained), num_classes=num_classes, **model_args
        )
    except (RuntimeError, TypeError, AssertionError) as error:
        similar = ", ".join(timm.list_models(f"{model[:5]}*")[:5]) or "timm.list_models()"
        raise ValueError(
            f"timm cannot create '{name}' with {model_args or 'no arguments'}: {error}. Check the "
            f"name (similar ones: {similar}), the tag and model_args."
        ) from error


def timm_head(network: nn.Module) -> str:
    """Dotted path of a timm model's classifier.

    Raises:
        ValueError: If timm names none, or several.
    """
    classifier = (getattr(network, "pretrained_cfg", None) or {}).get("classifier")
    if not isinstance(classifier, str):
        raise ValueError(
            f"timm gives {type(network).__name__} the classifier {classifier!r}, expected one "
            "dotted path. Give the path of its head with 'head'."
        )
    return classifier


def set_num_classes(network: nn.Module, head: str, num_classes: int) -> None:
    """Make the last linear layer of the head one of ``num_classes`` outputs, in place.

    It is left as it is where the size already fits; otherwise a new one takes its place.

    Raises:
        ValueError: If the head has no linear layer.
    """
    module = get_submodule(network, head)
    first_linear(module, head)
    names = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    path = f"{head}.{names[-1]}".rstrip(".")
    old = network.get_submodule(path)
    assert isinstance(old, nn.Linear)
    if old.out_features == num_classes:
        return
    new = nn.Linear(
        old.in_features,
        num_classes,
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    set_submodule(network, path, new)
    config: Any = getattr(network, "config", None)
    if hasattr(network, "config_class") and hasattr(config, "num_labels"):
        config.num_labels = num_classes  # what transformers saves beside the weights
