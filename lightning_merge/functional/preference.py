"""Reading a preference: one check for every place that takes one."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Preference: TypeAlias = Mapping[str, float | int] | Sequence[float | int] | Tensor

SUM_TOLERANCE = 1e-6
"""A preference whose sum differs from one by more is worth a word under ``strict``."""


def as_preference(
    preference: Preference,
    tasks: Sequence[str],
    *,
    strict: bool | Literal["error"] = False,
) -> Tensor:
    """One preference as a float64 vector over the tasks, non-negative and summing to one.

    Args:
        preference: Weights by task (a missing task counts 0), or one weight a task in the order of
            ``tasks``. Any positive sum is normalised.
        tasks: Names of the tasks, in order.
        strict: ``True`` warns and ``"error"`` raises if the sum is not one.

    Returns:
        A tensor of shape ``(T,)`` on the CPU.

    Raises:
        KeyError: If a name is unknown; the message lists the known ones.
        ValueError: If an entry is NaN, infinite or negative, the length is wrong, or all are zero.

    Example:
        >>> as_preference({"cars": 3.0, "digits": 1.0}, ["digits", "cars", "signs"])
        tensor([0.2500, 0.7500, 0.0000], dtype=torch.float64)
    """
    values = _listed(preference, tasks)
    for task, value in zip(tasks, values, strict=True):
        if not math.isfinite(value) or value < 0:
            raise ValueError(
                f"preference of task '{task}' is {value}; expected a finite weight of at least 0."
            )
    total = math.fsum(values)
    if not math.isfinite(total):
        raise ValueError(f"the weights of the preference sum to {total}: give smaller ones.")
    if total == 0:
        raise ValueError(
            f"every weight of the preference is zero; give at least one of {list(tasks)} a "
            "positive weight."
        )
    if strict and abs(total - 1) > SUM_TOLERANCE:
        message = f"the preference sums to {total:.9g}, expected 1; it is divided by its sum."
        if strict == "error":
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    return torch.tensor(values, dtype=torch.float64) / total


def as_preferences(
    preferences: Tensor | Sequence[Preference],
    tasks: Sequence[str],
    *,
    strict: bool | Literal["error"] = False,
) -> Tensor:
    """Several preferences as a float64 tensor of shape ``(P, T)``; see :func:`as_preference`.

    Args:
        preferences: A tensor of shape ``(P, T)``, or a list of anything that
            :func:`as_preference` takes.
        tasks: Names of the tasks, in order.
        strict: As in :func:`as_preference`.

    Raises:
        ValueError: As :func:`as_preference`, naming the row; or if there is no row.
    """
    if isinstance(preferences, Tensor) and preferences.ndim != 2:
        raise ValueError(
            f"preferences of shape {tuple(preferences.shape)}; expected (P, {len(tasks)}), "
            "one preference a row."
        )
    rows = [_numbered(number, row, tasks, strict) for number, row in enumerate(preferences)]
    if not rows:
        raise ValueError("no preference given; expected at least one row.")
    return torch.stack(rows)


def _numbered(
    number: int,
    row: Preference,
    tasks: Sequence[str],
    strict: bool | Literal["error"],
) -> Tensor:
    try:
        return as_preference(row, tasks, strict=strict)
    except ValueError as error:
        raise ValueError(f"preference {number}: {error}") from error


def _listed(preference: Preference, tasks: Sequence[str]) -> list[float]:
    if isinstance(preference, Mapping):
        unknown = [name for name in preference if name not in tasks]
        if unknown:
            raise KeyError(f"unknown tasks {unknown} in the preference; known: {list(tasks)}.")
        return [float(preference.get(task, 0.0)) for task in tasks]
    if isinstance(preference, Tensor):
        if preference.ndim != 1 or preference.is_complex():
            raise ValueError(
                f"a preference of shape {tuple(preference.shape)} and {preference.dtype}; expected "
                f"{len(tasks)} real numbers, one a task."
            )
        preference = preference.detach().to("cpu", torch.float64).tolist()
    if len(preference) != len(tasks):
        raise ValueError(
            f"the preference has {len(preference)} weights for the {len(tasks)} tasks "
            f"{list(tasks)}."
        )
    return [float(value) for value in preference]
