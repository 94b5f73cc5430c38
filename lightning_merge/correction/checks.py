"""Checks of what a correction is made from."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_merge.correction.choice import Choice
from lightning_merge.correction.statistics import CorrectionStatistics

Head = tuple[Tensor, Tensor | None]
"""Weight (K, k) and bias (K,) of a linear head."""


def check_option(name: str, value: object, known: Sequence[str]) -> None:
    """Raise a ``ValueError`` if an option is none of the known ones."""
    if value not in known:
        raise ValueError(f"{name}={value!r}: expected one of {tuple(known)}.")


def check_statistics(statistics: Mapping[str, CorrectionStatistics]) -> None:
    """Raise a ``ValueError`` unless all statistics are of one merged backbone."""
    if not statistics:
        raise ValueError("no statistics: a correction needs at least one task.")
    first_task, first = next(iter(statistics.items()))
    for task, other in statistics.items():
        mine = {"dim_merged": first.dim_merged, **first.metadata}
        theirs = {"dim_merged": other.dim_merged, **other.metadata}
        differing = [
            f"{key} {mine[key]!r} vs {theirs[key]!r}" for key in mine if mine[key] != theirs[key]
        ]
        if differing:
            raise ValueError(
                f"statistics of '{first_task}' and '{task}' are of different backbones: "
                f"{'; '.join(differing)}. Calibrate all tasks on one merged backbone."
            )


def check_heads(
    heads: Mapping[str, Head],
    statistics: Mapping[str, CorrectionStatistics],
) -> None:
    """Raise if a head is of an unknown task or does not read the task's representation.

    Raises:
        KeyError: If a task is unknown.
        ValueError: If the shapes of weight and bias do not fit.
    """
    unknown = [task for task in heads if task not in statistics]
    if unknown:
        raise KeyError(f"heads of unknown tasks {unknown}; known: {list(statistics)}.")
    for task, (weight, bias) in heads.items():
        k = statistics[task].dim_expert
        shape = tuple(weight.shape)
        wrong_bias = bias is not None and tuple(bias.shape) != shape[:1]
        if weight.ndim != 2 or shape[1] != k or wrong_bias:
            found = None if bias is None else tuple(bias.shape)
            raise ValueError(
                f"head of '{task}': weight {shape} and bias {found}; expected (K, {k}) and (K,), "
                "the linear layer that reads the representation."
            )


def check_widths(statistics: Mapping[str, CorrectionStatistics]) -> None:
    """Raise a ``ValueError`` if tasks that are mixed have experts of different widths."""
    widths = {task: s.dim_expert for task, s in statistics.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"tasks of different expert widths have positive preference: {widths}. They share no "
            "map: ask for one-hot preferences, one at a time."
        )


def check_beta(
    beta: float | str | Mapping[str, float], tasks: list[str], subset: bool = False
) -> None:
    """Raise a ``ValueError`` unless there is a ridge for each task, or, in a subset, at least."""
    if isinstance(beta, str):
        check_option("beta", beta, ("auto",))
        return
    if isinstance(beta, Mapping):
        missing = [task for task in tasks if task not in beta]
        if missing or (not subset and len(beta) != len(tasks)):
            raise ValueError(f"beta for {sorted(beta)}; expected one for each of {tasks}.")
    for value in beta.values() if isinstance(beta, Mapping) else [beta]:
        Choice(beta=float(value))


def checked_metric(
    metric: str,
    heads: Mapping[str, Head] | None,
    statistics: Mapping[str, CorrectionStatistics],
    aggregation: str,
    bias: str,
) -> Mapping[str, Head] | None:
    """The heads that the metric uses, if any, where the options go together.

    Raises:
        ValueError: If options exclude each other, or a head is missing.
    """
    if aggregation == "polar" and bias == "shared":
        raise ValueError("aggregation='polar' has no shared bias: use bias='none' or 'per_task'.")
    if metric == "representation":
        return None
    if aggregation != "data_aware":
        raise ValueError(f"metric='head' and aggregation='{aggregation}' exclude each other.")
    missing = [task for task in statistics if task not in (heads or {})]
    if heads is None or missing:
        raise ValueError(f"metric='head' needs the head of every task; missing: {missing}.")
    check_heads(heads, statistics)
    return dict(heads)
