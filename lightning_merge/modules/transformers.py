"""Classifiers of the transformers library: built with their weights, described as plain data."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_merge.packages import package_path


def sequence_classifier(
    path: str, pretrained: bool = True, frozen: tuple[str, ...] = (), num_labels: int = 2
) -> nn.Module:
    """Build the classifier of transformers for an encoder, with a new head.

    It is the library's own class, such as ``BertForSequenceClassification``, with its own
    parameter names; nothing is wrapped around it. Most classes name their head ``classifier``.

    Args:
        path: Folder of the encoder, as ``save_pretrained`` writes it; its name on the Hugging
            Face Hub; or ``PACKAGE:FOLDER`` of an installed package.
        pretrained: Load the weights; otherwise draw them, and read the configuration alone.
        frozen: Parts that are not fine-tuned, as dotted paths (``bert.embeddings``).
        num_labels: Outputs of the head.

    Raises:
        ValueError: If transformers is not installed, there is no encoder, or a part is unknown.
    """
    try:
        from transformers import AutoConfig, AutoModelForSequenceClassification
    except ImportError as error:
        raise ValueError(
            "transformers is not installed: pip install 'lightning-merge[text]'."
        ) from error
    place = package_path(path)
    try:
        if pretrained:
            network = AutoModelForSequenceClassification.from_pretrained(
                place, num_labels=num_labels
            )
        else:
            config = AutoConfig.from_pretrained(place, num_labels=num_labels)
            network = AutoModelForSequenceClassification.from_config(config)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot build a classifier from '{place}' ({str(error).splitlines()[0]}). Give a "
            "folder of save_pretrained, or a name on the Hub where there is a network."
        ) from error
    for part in frozen:
        _freeze(network, part)
    network.train()  # loaded weights come in eval mode, and a fit leaves modes as they are
    return network


def transformers_spec(network: nn.Module) -> dict[str, Any] | None:
    """Class path and arguments that rebuild a model of transformers, its weights apart.

    Returns:
        Plain data; ``None`` for a module that is none of transformers'.
    """
    config: Any = getattr(network, "config", None)
    if not hasattr(network, "config_class") or not hasattr(config, "to_diff_dict"):
        return None
    facts: Mapping[str, Any] = config.to_diff_dict()
    kind = type(network)
    arguments = {
        key: value
        for key, value in facts.items()
        if not key.startswith("_") and key not in ("transformers_version", "model_type")
    }
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "init_args": {"config": arguments},
    }


def _freeze(network: nn.Module, part: str) -> None:
    found = [
        value
        for name, value in network.named_parameters()
        if name == part or name.startswith(f"{part}.")
    ]
    if not found:
        known = ", ".join(name for name, _ in network.named_children())
        raise ValueError(
            f"cannot freeze '{part}': {type(network).__name__} has no such part. Its children "
            f"are {known}."
        )
    for value in found:
        value.requires_grad_(False)
