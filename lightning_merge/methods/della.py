"""DELLA: drop entries at random, small ones more often than large ones, then elect signs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import final

from torch import Tensor

from lightning_merge.functional.dare import Rescale
from lightning_merge.functional.della import keep_probabilities
from lightning_merge.functional.ties import SumOrTies
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.checks import check_density, check_scale
from lightning_merge.methods.masks import RandomDrop, numbered
from lightning_merge.states import StateDict


@final
@dataclass(frozen=True, kw_only=True)
class DELLA(WeightMethod):
    """Drops small entries of the task vectors with higher probability, rescales, elects signs."""

    density: float = 0.5
    """Mean probability that an entry is kept, in (0, 1]."""

    epsilon: float = 0.1
    """Half-width of the range of probabilities within a row (the paper's is the full width)."""

    scale: float = 1.0
    """Coefficient λ of the combined task vector; 0.3 is usual with ``combine: sum``."""

    combine: SumOrTies = "ties"
    """Elect signs and average what has them, as TIES does, or sum the task vectors."""

    rescale: Rescale = "inverse"
    """Divide by an entry's own probability (the paper), restore a norm, or leave what is kept."""

    seed: int = 0
    """Seed of the masks; they depend on it, the task and the parameter's name, nothing else."""

    def __post_init__(self) -> None:
        check_density(self.density)
        check_scale(self.scale)
        low, high = self.density - self.epsilon, self.density + self.epsilon
        if self.epsilon < 0 or not (low > 0 and high <= 1 + 1e-12):
            raise ValueError(
                f"epsilon must lie in [0, {min(self.density, 1 - self.density):g}] for density "
                f"{self.density}, so that every probability lies in (0, 1]; found {self.epsilon}."
            )

    def bind(self, base: StateDict, experts: Mapping[str, StateDict]) -> WeightMethod:
        """Remember the tasks, on which the masks depend."""
        return self.bound_to(self._drop().for_tasks(experts))

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter of experts that are called "0", "1", and so on."""
        return self._drop().merge(numbered(experts), name, base, experts)

    def _drop(self) -> RandomDrop:
        return RandomDrop(
            keep=partial(keep_probabilities, density=self.density, epsilon=self.epsilon),
            rescale=self.rescale,
            seed=self.seed,
            combine=self.combine,
            scale=self.scale,
        )
