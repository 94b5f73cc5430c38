"""Which parameters a method applies to, and with what coefficient: patterns of names."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import final


@final
@dataclass(frozen=True, kw_only=True)
class Coefficient:
    """Multiplies task vectors before a method sees them; of several rules the first match counts.

    With the pattern of a layer or a block it is a layer-wise coefficient, with a task a task-wise
    one, with both AdaMerging's coefficient of one layer of one task.
    """

    value: float
    """Factor of the task vector; dimensionless, finite, may be negative (forgetting)."""

    pattern: str = "*"
    """Names of the parameters: a shell pattern such as 'blocks.0.*' or '*.qkv.weight'."""

    task: str | None = None
    """The task whose vector it multiplies; null: every task's."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"coefficient of '{self.pattern}' must be finite, found {self.value}.")


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches one of the shell patterns; case counts.

    Example:
        >>> matches("blocks.0.mlp.weight", ["blocks.0.*"]), matches("blocks.10.mlp", ["blocks.1.*"])
        (True, False)
    """
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def coefficients_of(
    name: str, tasks: Sequence[str], rules: Sequence[Coefficient]
) -> tuple[float, ...]:
    """Coefficient of each task's vector of one parameter; one where no rule matches.

    Example:
        >>> rules = [Coefficient(value=0.5, task="cars"), Coefficient(value=2.0, pattern="stem.*")]
        >>> coefficients_of("stem.weight", ["cars", "dogs"], rules)
        (0.5, 2.0)
    """
    return tuple(_coefficient(name, task, rules) for task in tasks)


def check_rules(tasks: Sequence[str], names: Sequence[str], rules: Sequence[Coefficient]) -> None:
    """Raise a ``ValueError`` naming every rule with an unknown task or without a parameter."""
    problems = [
        f"task '{rule.task}' is not among the experts ({', '.join(tasks)})"
        for rule in rules
        if rule.task is not None and rule.task not in tasks
    ]
    problems += [
        f"pattern '{pattern}' matches no parameter"
        for pattern in idle(names, [rule.pattern for rule in rules])
    ]
    if problems:
        raise ValueError("coefficients: " + "; ".join(problems) + ". Correct or remove the rule.")


def check_patterns(names: Sequence[str], patterns: Mapping[str, Sequence[str]]) -> None:
    """Raise a ``ValueError`` naming every pattern, by option, that matches no parameter."""
    problems = [
        f"{option}: pattern '{pattern}' matches no parameter"
        for option, given in patterns.items()
        for pattern in idle(names, given)
    ]
    if problems and names:
        shown = ", ".join(names[:5]) + (f", … ({len(names) - 5} more)" if len(names) > 5 else "")
        raise ValueError(
            f"{'; '.join(problems)}. Correct or remove the pattern; parameters are: {shown}."
        )


def warn_of_idle(names: Sequence[str], exclude: Sequence[str]) -> None:
    """Say which patterns exclude nothing: harmless where a model lacks a part, or a slip."""
    if found := idle(names, exclude):
        shown = ", ".join(f"'{pattern}'" for pattern in found)
        warnings.warn(f"exclude: no parameter matches {shown}; nothing is left out.", stacklevel=5)


def idle(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Patterns that match none of the names."""
    return [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]


def _coefficient(name: str, task: str, rules: Sequence[Coefficient]) -> float:
    for rule in rules:
        if rule.task in (None, task) and fnmatchcase(name, rule.pattern):
            return rule.value
    return 1.0
