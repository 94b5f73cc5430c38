"""How strongly, and towards what, the map of one task is regularised."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_merge.correction.moments import Moments
from lightning_merge.functional.procrustes import procrustes, similarity_scale

BetaMode = Literal["relative", "per_sample", "absolute"]
PriorName = Literal["procrustes", "scaled", "identity", "svd", "given"]

DEFAULT_BETA = 1e-2
"""Relative ridge where nothing better can be found."""


@dataclass(frozen=True)
class Choice:
    """Prior and ridge of one task."""

    prior: PriorName = "procrustes"
    """``procrustes`` (identity-anchored), ``scaled`` (times its best factor), ``identity``,
    ``svd`` (the paper's plain decomposition) or ``given``."""
    anchor: float = 0.0
    """Pull of ``procrustes`` and ``scaled`` to the identity, in units of tr(G)/d."""
    beta: float = DEFAULT_BETA
    """Ridge in the units of ``beta_mode``; 0 and infinity are limits."""
    searched: bool = False
    """Whether it was found from the data: then a strong ridge says "no evidence", and is kept from
    dragging other tasks along (:class:`~lightning_merge.correction.fit.TaskFit`)."""

    def __post_init__(self) -> None:
        if self.prior not in get_args(PriorName):
            raise ValueError(f"prior={self.prior!r}: expected one of {get_args(PriorName)}.")
        if math.isnan(self.beta) or self.beta < 0:
            raise ValueError(f"beta={self.beta}: expected a number of at least 0.")
        if not self.anchor >= 0 or math.isinf(self.anchor):
            raise ValueError(f"anchor={self.anchor}: expected a finite number of at least 0.")

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; an infinite ridge is the string ``"inf"``."""
        beta = "inf" if math.isinf(self.beta) else self.beta
        return {"prior": self.prior, "anchor": self.anchor, "beta": beta, "searched": self.searched}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Choice":
        """The inverse of :meth:`as_dict`."""
        return cls(
            prior=value["prior"],
            anchor=float(value["anchor"]),
            beta=float(value["beta"]),
            searched=bool(value["searched"]),
        )


def reusable_choices(
    choices: Mapping[str, Mapping[str, Any]], tasks: Sequence[str], metric: str
) -> tuple[dict[str, Choice], float | None]:
    """What stored choices say of some tasks, and the bound on ridges in their mixtures.

    A choice that was searched in another metric is left out: it minimises another error. The bound
    belongs to a set of tasks, so it is None unless the choices are of these very tasks.

    Args:
        choices: What ``ClosedFormCorrection.choices`` once returned.
        tasks: The tasks there are now.
        metric: The metric they are solved in now.
    """
    fitting = {
        task: choice
        for task, choice in choices.items()
        if task in tasks and choice.get("metric", metric) == metric
    }
    known = {task: Choice.from_dict(choice) for task, choice in fitting.items()}
    caps = [choice["mixing_cap"] for choice in fitting.values() if "mixing_cap" in choice]
    same = fitting.keys() == choices.keys() == set(tasks)
    return known, min(caps) if same and caps else None


def beta_unit(mode: BetaMode, moments: Moments) -> float:
    """What ``beta = 1`` means in absolute terms for one task."""
    if mode == "relative":
        return float(moments.gram.trace()) / len(moments.gram)
    return moments.n if mode == "per_sample" else 1.0


def prior_matrix(
    choice: Choice,
    moments: Moments,
    *,
    given: Tensor | None = None,
    proper: bool = False,
    refine: bool = True,
) -> Tensor:
    """The prior W0 (k, d) of one task, from its moments alone.

    Args:
        choice: Which prior, and its anchor.
        moments: Of the training samples; centred if the correction has a bias.
        given: The matrix of ``prior="given"``.
        proper: No reflections.
        refine: Refine the Procrustes solution for k < d.

    Raises:
        ValueError: If the prior does not exist for these widths or moments.
    """
    k, d = moments.cross.shape
    if choice.prior == "given":
        if given is None or given.shape != (k, d):
            found = None if given is None else tuple(given.shape)
            raise ValueError(f"the given prior has shape {found}; expected {(k, d)}.")
        return given.detach().to(moments.cross)
    if choice.prior == "identity":
        if k != d:
            raise ValueError(
                f"prior='identity' needs equal widths, got {k} expert and {d} merged features. "
                "Use prior='procrustes' or give a matrix."
            )
        return torch.eye(d).to(moments.cross)
    W0 = procrustes(
        moments.cross,
        moments.gram,
        anchor=choice.anchor,
        completion="svd" if choice.prior == "svd" else "identity",
        proper=proper,
        refine=refine,
    )
    if choice.prior == "scaled":
        W0 = W0 * similarity_scale(W0, moments.cross, moments.gram)
    return W0
