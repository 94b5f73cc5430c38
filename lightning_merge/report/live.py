"""What the report embeds so that its sliders evaluate any preference exactly, in the browser.

With ``W_p = (Σ p_t N_t)(Σ p_t C_t)^{-1}`` the folded head of task ``t`` is
``H_t W_p = (Σ p_s H_t N_s)(Σ p_s C_s)^{-1}``: the page needs the products ``H_t N_s`` and the
matrices ``C_s`` in float64, and some test features. It solves by Cholesky and counts the hits.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_merge.functional.spread import evenly_spread

SAMPLES_PER_TASK = 200
"""Test samples of each task that a report embeds unless told otherwise."""

MAX_BYTES = 12_000_000
"""Largest embedded payload; a bigger one is left out, since browsers open such pages slowly."""


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class LiveModel:
    """Statistics and test samples behind the sliders, for ``T`` tasks and width ``d``.

    Build it with :func:`build_live`.
    """

    tasks: tuple[str, ...]
    """Names of the tasks, in the order of everything else."""
    gram: Float[Tensor, "T d d"]
    """``C_t``, float64: symmetric positive definite for every preference."""
    products: Float[Tensor, "T K d"]
    """``H N_t``, float64, with the ``K`` class rows of all heads stacked in task order."""
    bias: Float[Tensor, " K"]
    """The heads' biases, stacked alike, float64."""
    classes: tuple[int, ...]
    """Rows of each head."""
    features: tuple[Float[Tensor, "n d"], ...]
    """Merged features of the embedded test samples of each task, float32."""
    labels: tuple[Int[Tensor, " n"], ...]
    """Their classes."""
    available: tuple[int, ...]
    """How many test samples each task has in all."""

    @property
    def num_bytes(self) -> int:
        """Size of the base64 text in the page, in bytes."""
        return -(-self._num_raw_bytes // 3) * 4

    @property
    def _num_raw_bytes(self) -> int:
        width, tasks = self.gram.shape[-1], len(self.tasks)
        doubles = tasks * width * (width + 1) // 2 + self.products.numel() + self.bias.numel()
        samples = sum(len(labels) for labels in self.labels)
        return 8 * doubles + 4 * samples * (width + 1)

    def header(self) -> str:
        """The shapes as JSON text."""
        return json.dumps(
            {
                "width": self.gram.shape[-1],
                "classes": self.classes,
                "samples": [len(labels) for labels in self.labels],
                "available": self.available,
            }
        )

    def encode(self) -> str:
        """All numbers as one base64 text, little endian.

        In order: the upper triangles of ``gram`` row by row, ``products``, ``bias`` (float64);
        ``features`` (float32); ``labels`` (int32).
        """
        rows, columns = torch.triu_indices(*self.gram.shape[1:])
        doubles = [self.gram[:, rows, columns], self.products, self.bias]
        parts = [part.contiguous().numpy().astype("<f8").tobytes() for part in doubles]
        parts += [part.contiguous().numpy().astype("<f4").tobytes() for part in self.features]
        parts += [part.contiguous().numpy().astype("<i4").tobytes() for part in self.labels]
        return base64.b64encode(b"".join(parts)).decode("ascii")


def build_live(
    heads: Mapping[str, tuple[Float[Tensor, "K k"], Float[Tensor, " K"] | None]],
    normal: Mapping[str, tuple[Float[Tensor, "k d"], Float[Tensor, "d d"]]],
    samples: Mapping[str, tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]],
    *,
    samples_per_task: int | None = SAMPLES_PER_TASK,
    available: Mapping[str, int] | None = None,
) -> LiveModel:
    """Gather what the page needs; at most ``samples_per_task`` evenly spread samples each.

    A correction with a bias that depends on the preference fits as well: border the matrices,
    ``N_t`` to ``(k, d + 1)`` and ``C_t`` to ``(d + 1, d + 1)``, and append a one to each feature.

    Args:
        heads: ``(weight, bias)`` of the first linear layer of each task's head, as trained.
        normal: ``(N_t, C_t)`` of each task, scaled so that
            ``W_p = (Σ p_t N_t)(Σ p_t C_t)^{-1}`` for a preference ``p``.
        samples: Merged features (uncorrected) of each task's test set, with labels.
        samples_per_task: How many to embed; ``None`` for all.
        available: Test samples each task has in all, where ``samples`` are some of them.

    Raises:
        ValueError: If tasks or shapes do not fit together, naming them.
    """
    tasks = tuple(heads)
    for name, mapping in (("normal", normal), ("samples", samples)):
        if set(mapping) != set(tasks):
            raise ValueError(f"{name} has the tasks {sorted(mapping)}, heads has {sorted(tasks)}.")
    if not tasks:
        raise ValueError("a live model needs at least one task.")
    for task in tasks:
        _check_task(task, heads[task], normal[task], samples[task], normal[tasks[0]][0])
    stacked = torch.cat([heads[task][0].detach().cpu().double() for task in tasks])
    biases = [
        weight.new_zeros(len(weight)) if bias is None else bias
        for weight, bias in (heads[task] for task in tasks)
    ]
    chosen = [evenly_spread(len(samples[task][1]), samples_per_task) for task in tasks]
    picked = [
        (samples[task][0].detach().cpu()[rows], samples[task][1].detach().cpu()[rows])
        for task, rows in zip(tasks, chosen, strict=True)
    ]
    return LiveModel(
        tasks=tasks,
        gram=torch.stack([normal[task][1].detach().cpu().double() for task in tasks]),
        products=torch.stack([stacked @ normal[task][0].detach().cpu().double() for task in tasks]),
        bias=torch.cat([bias.detach().cpu().double() for bias in biases]),
        classes=tuple(len(heads[task][0]) for task in tasks),
        features=tuple(features.float() for features, _ in picked),
        labels=tuple(labels.int() for _, labels in picked),
        available=tuple((available or {}).get(task, len(samples[task][1])) for task in tasks),
    )


def evaluate(live: LiveModel, preference: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Accuracy of each task's embedded samples at one preference, as the page computes it.

    Args:
        live: The embedded model.
        preference: Non-negative weights, not all zero; only their direction counts.
    """
    weights = preference.double()
    gram = torch.einsum("t,tij->ij", weights, live.gram)
    product = torch.einsum("t,tki->ki", weights, live.products)
    folded = torch.cholesky_solve(product.T, torch.linalg.cholesky(gram)).T
    accuracies = []
    for task, rows in enumerate(torch.arange(len(live.bias)).split(list(live.classes))):
        logits = live.features[task].double() @ folded[rows].T + live.bias[rows]
        accuracies.append((logits.argmax(dim=1) == live.labels[task]).double().mean())
    return torch.stack(accuracies)


def _check_task(
    task: str,
    head: tuple[Tensor, Tensor | None],
    normal: tuple[Tensor, Tensor],
    samples: tuple[Tensor, Tensor],
    first: Tensor,
) -> None:
    weight, bias = head
    width, depth = first.shape[1], first.shape[0]
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "N": (normal[0], (depth, width)),
        "C": (normal[1], (width, width)),
        "head weight": (weight, (len(weight), depth)),
        "features": (samples[0], (len(samples[1]), width)),
    }
    if bias is not None:
        expected["head bias"] = (bias, (len(weight),))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"task '{task}': {name} must have shape {shape}, found {tuple(tensor.shape)}."
            )
    if len(samples[1]) == 0:
        raise ValueError(f"task '{task}' has no test samples to embed.")
