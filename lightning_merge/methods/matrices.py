"""Which parameters are matrices to a spectral method, and how they are cut."""

import warnings
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Convolutions: TypeAlias = Literal["mean", "matrix"]


def merge_matrices(
    task_vectors: Tensor,
    merge: Callable[[Tensor], Tensor],
    *,
    name: str,
    convolutions: Convolutions,
    split: Mapping[str, int],
) -> Tensor:
    """Merge task vectors as matrices, and by their mean where they are none.

    Args:
        task_vectors: Task vectors of one parameter, of shape ``(T, *shape)``.
        merge: Merges those of one matrix: ``(T, m, n)`` to ``(m, n)``.
        name: Name of the parameter.
        convolutions: Whether a kernel counts as the matrix ``(out, in * kh * kw)``.
        split: By pattern of names, into how many parts the rows of a fused matrix are cut.

    Raises:
        ValueError: If the rows cannot be cut into that many parts.
    """
    shape = task_vectors.shape[1:]
    if not is_matrix(shape, convolutions):
        return task_vectors.mean(dim=0, dtype=torch.float64)
    matrices = task_vectors.flatten(2)
    parts = parts_of(name, split)
    if shape[0] % parts:
        raise ValueError(
            f"split: '{name}' has {shape[0]} rows, which do not divide into {parts} parts. "
            "Correct the pattern or the number."
        )
    merged = [merge(part) for part in matrices.chunk(parts, dim=1)]
    return torch.cat(merged).view(shape)


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
        shown = ", ".join(names[:5]) + (f", … ({len(names) - 5} more)" if len(names) > 5 else "")
        warnings.warn(
            f"{method}: {len(names)} matrices have fewer rows or columns than the {num_experts} "
            f"experts, so no direction is left for each; they get the mean: {shown}.",
            stacklevel=4,
        )
