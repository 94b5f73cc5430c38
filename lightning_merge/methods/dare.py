"""DARE: drop entries of the task vectors at random, rescale the rest, then merge."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from lightning_merge.functional.dare import Rescale
from lightning_merge.functional.ties import SumOrTies
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.blocks import Rooms
from lightning_merge.methods.checks import check_density, check_scale
from lightning_merge.methods.masks import RandomDrop, numbered
from lightning_merge.states import StateDict, shape_of


@final
@dataclass(frozen=True, kw_only=True)
class DARE(WeightMethod):
    """Drops entries of the task vectors at random, rescales the rest, and sums or elects signs."""

    density: float = 0.1
    """Probability that an entry is kept, in (0, 1]; the paper's drop rate is 1 - density."""

    scale: float = 0.3
    """Coefficient λ of the combined task vector; 1.0 is usual with ``combine: ties``."""

    combine: SumOrTies = "sum"
    """Sum the task vectors, or elect signs and average what has them, as TIES does."""

    rescale: Rescale = "inverse"
    """Divide by the density (the paper), restore the L1 or L2 norm, or leave what is kept."""

    targets: Literal["all", "matrices"] = "all"
    """Whose entries are dropped: those of every parameter, or of matrices alone, which are the
    weights of linear layers and of embeddings; the rest is combined as it is."""

    seed: int = 0
    """Seed of the masks; they depend on it, the task and the parameter's name, nothing else."""

    def __post_init__(self) -> None:
        check_density(self.density)
        check_scale(self.scale)

    def bind(self, base: StateDict, experts: Mapping[str, StateDict]) -> WeightMethod:
        """Remember the tasks, on which the masks depend."""
        tasks = tuple(experts)
        if self.rescale in ("l1", "l2"):  # norms of whole parameters

            def merge(name: str, base: Tensor, experts: Tensor) -> Tensor:
                return self._drop(base.shape).merge(tasks, name, base, experts)

            return self.bound_to(merge)
        rooms = Rooms()
        return self.bound_to_blocks(
            lambda name: self._drop(shape_of(base, name)).for_blocks(tasks, rooms), on_cores=True
        )

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter of experts that are called "0", "1", and so on."""
        return self._drop(base.shape).merge(numbered(experts), name, base, experts)

    def _drop(self, shape: tuple[int, ...]) -> RandomDrop:
        density = self.density if self.targets == "all" or len(shape) == 2 else 1.0
        return RandomDrop(
            keep=lambda _: float(density),
            rescale=self.rescale,
            seed=self.seed,
            combine=self.combine,
            scale=self.scale,
        )
