"""Heads of CLIP from the names of the classes: no image and no training.

``python -m lightning_merge.zero_shot --suite configs/clip_vit_b32/suite.yaml --prompts
configs/clip_vit_b32/prompts.yaml --output runs/clip_vit_b32/heads`` writes one head a task.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, auto_cli
from torch import Tensor
from torch.nn.functional import normalize

from lightning_merge.data import TaskSuite
from lightning_merge.files import write_tensors

Encoder = Callable[[Sequence[str]], Tensor]
"""From texts to embeddings ``(texts, dim)``."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """How the classes of one task are put into words."""

    templates: tuple[str, ...]
    """Sentences with {} in the place of the class."""
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of their labels; by default those of the data set."""

    def __post_init__(self) -> None:
        if not self.templates:
            raise ValueError("templates are empty; give at least one, such as 'a photo of a {}.'.")
        if wrong := [text for text in self.templates if "{}" not in text]:
            raise ValueError(f"the templates {wrong} have no {{}} in the place of the class.")


def zero_shot_weight(
    encode: Encoder, names: Sequence[str], templates: Sequence[str], scale: float = 100.0
) -> Tensor:
    r"""Weight of the head that scores an embedding by its cosine with the classes' texts.

    .. math:: w_k = s\,\frac{m_k}{\lVert m_k\rVert},\quad
        m_k = \frac1P \sum_p \frac{e_{kp}}{\lVert e_{kp}\rVert}

    with :math:`e_{kp}` the embedding of class k in template p (Radford et al., 2021,
    arXiv:2103.00020, Section 3.1.4).

    Args:
        encode: The text tower.
        names: Names of the K classes.
        templates: Sentences with ``{}`` in the place of the class.
        scale: Factor s of the cosine; 100 in CLIP.

    Returns:
        ``(K, dim)``, rows of length ``scale``.
    """
    rows = []
    for name in names:
        found = encode([template.format(name) for template in templates]).float()
        rows.append(normalize(normalize(found, dim=-1).mean(0), dim=-1))
    return scale * torch.stack(rows)


def read_prompts(path: Path) -> dict[str, Prompts]:
    """Read the prompts of each task from YAML: ``{task: {templates: [...], classes: [...]}}``.

    Raises:
        ValueError: If the file is no such mapping.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return {
            task: Prompts(
                templates=tuple(found["templates"]),
                classes=None if found.get("classes") is None else tuple(found["classes"]),
            )
            for task, found in content.items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no mapping of tasks to 'templates' and (optionally) 'classes'."
        ) from error


def write_heads(
    suite: TaskSuite, prompts: Mapping[str, Prompts], encode: Encoder, output: Path
) -> None:
    """Write ``TASK.safetensors`` with ``weight`` and a ``bias`` of zeros for every task.

    Raises:
        ValueError: If a task has no prompts, or another number of names than of classes.
    """
    if missing := [task for task in suite.tasks if task not in prompts]:
        raise ValueError(f"no prompts for {', '.join(missing)}; add them to the file of prompts.")
    output.mkdir(parents=True, exist_ok=True)
    for task, data in suite.tasks.items():
        own = prompts[task]
        found: Sequence[str] = own.classes or getattr(data, "class_names", None) or ()
        names = [name.replace("_", " ") for name in found]
        if len(names) != data.num_classes:
            raise ValueError(
                f"task '{task}' has {data.num_classes} classes, but there are {len(names)} names. "
                "Give all of them under 'classes' in the file of prompts."
            )
        weight = zero_shot_weight(encode, names, own.templates)
        tensors = {"weight": weight, "bias": torch.zeros(len(weight))}
        write_tensors(output / f"{task}.safetensors", tensors)


def clip_encoder(model: str, pretrained: str | None) -> Encoder:
    """The text tower of open_clip.

    Args:
        model: Its name there.
        pretrained: Tag of its weights, or a file of them; None draws them.

    Raises:
        ValueError: If open_clip is not installed, or knows no such model.
    """
    try:
        open_clip = importlib.import_module("open_clip")
    except ImportError as error:
        raise ValueError(
            "open_clip is not installed: pip install 'lightning-merge[clip]'."
        ) from error
    try:
        network = open_clip.create_model(model, pretrained=pretrained).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"open_clip cannot create '{model}' ({pretrained}): {error}") from error
    tokenize = open_clip.get_tokenizer(model)

    def encode(texts: Sequence[str]) -> Tensor:
        with torch.inference_mode():
            return network.encode_text(tokenize(list(texts)))

    return encode


def build_suite(config: Mapping[str, Any]) -> TaskSuite:
    """The data of a suite's YAML.

    Raises:
        ValueError: If there are no tasks in it.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TaskSuite, "data", required=True)
    parsed = parser.parse_object({"data": config.get("data")})
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return instantiate(parsed).data


def make(
    suite: Path,
    prompts: Path,
    output: Path,
    model: str = "ViT-B-32-quickgelu",
    pretrained: str | None = "openai",
) -> None:
    """Write the zero-shot heads of a suite.

    Args:
        suite: The suite's YAML; its 'data' is read.
        prompts: YAML of templates (and names of classes) by task.
        output: Folder to write into.
        model: Name of the model in open_clip; its image tower must be that of the experts.
        pretrained: Tag of its weights in open_clip.
    """
    config = yaml.safe_load(suite.read_text(encoding="utf-8"))
    write_heads(build_suite(config), read_prompts(prompts), clip_encoder(model, pretrained), output)


if __name__ == "__main__":
    auto_cli(make)
