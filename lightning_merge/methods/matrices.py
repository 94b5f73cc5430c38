"""Which parameters are matrices to a spectral method, and how they are cut."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_merge.functional.task_arithmetic import add_update, summed, task_vectors_of
from lightning_merge.methods.walk import Rows

Convolutions: TypeAlias = Literal["mean", "matrix"]


def merge_matrices(
    base: Tensor,
    experts: Sequence[Tensor] | Tensor,
    merge: Callable[[Sequence[Tensor]], Tensor],
    *,
    name: str,
    scale: float,
    convolutions: Convolutions,
    split: Mapping[str, int],
) -> Tensor:
    """Merge the task vectors of a parameter as matrices, and by their mean where they are none.

    Args:
        base: The pre-trained value, of any shape.
        experts: Fine-tuned values, stacked or one by one.
        merge: Merges the task vectors of one matrix, T of ``(m, n)``, into ``(m, n)``.
        name: Name of the parameter.
        scale: Coefficient of the merged update.
        convolutions: Whether a kernel counts as the matrix ``(out, in * kh * kw)``.
        split: By pattern of names, into how many parts the rows of a fused matrix are cut.

    Raises:
        ValueError: If the rows cannot be cut into that many parts.
    """
    shape, number = base.shape, len(experts)

    def task_vector(t: int) -> Tensor:
        return task_vectors_of(base, experts[t][None])[0]

    if not is_matrix(shape, convolutions):
        return add_update(base, summed(Rows(task_vector, number)) / number, scale)
    parts = parts_of(name, split)
    if shape[0] % parts:
        raise ValueError(
            f"split: '{name}' has {shape[0]} rows, which do not divide into {parts} parts. "
            "Correct the pattern or the number."
        )

    def matrix(part: int, t: int) -> Tensor:
        return task_vector(t).flatten(1).chunk(parts)[part]

    merged = [merge(Rows(partial(matrix, part), number)) for part in range(parts)]
    return add_update(base, torch.cat(merged).view(shape), scale)


def is_matrix(shape: tuple[int, ...], convolutions: Convolutions) -> bool:
    """Whether a parameter of this shape is merged as a matrix: not empty, and of two dimensions."""
    return 0 not in shape and (len(shape) == 2 or (len(shape) > 2 and convolutions == "matrix"))


def parts_of(name: str, split: Mapping[str, int]) -> int:
    """Number of parts of a parameter by the first pattern that matches, or one."""
    return next((num for pattern, num in split.items() if fnmatchcase(name, pattern)), 1)


def check_split(split: Mapping[str, int]) -> None:
    """Parts are at least one."""
    for pattern, parts in split.items():
        if parts < 1:
            raise ValueError(f"split of '{pattern}' must be at least 1, found {parts}.")


def warn_of_small(names: list[str], num_experts: int, method: str) -> None:
    """Say once which matrices are too small for a direction of every expert."""
    if names:
        warnings.warn(
            f"{method}: {len(names)} matrices have fewer rows or columns than the {num_experts} "
            f"experts, so no direction is left for each; they get the mean: {_shown(names)}.",
            stacklevel=4,
        )


def warn_of_capped(names: list[str], rank: int, method: str) -> None:
    """Say once in which matrices the experts cannot have this many directions each."""
    if names:
        warnings.warn(
            f"{method}: rank {rank} is more than min(m, n) // T of {len(names)} matrices, which "
            f"use that: {_shown(names)}.",
            stacklevel=4,
        )


def _shown(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", … ({len(names) - 5} more)" if len(names) > 5 else "")
