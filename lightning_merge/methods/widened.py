"""Models whose values are read in float64."""

from collections.abc import Iterator
from typing import final

from torch import Tensor

from lightning_merge.methods.low_rank import FactorsOf
from lightning_merge.states import Described, StateDict, dtype_of, kind_of, shape_of


@final
class Widened(Described):
    """A state dict that gives its floating-point values as float64, and the factors of updates.

    Args:
        state: The state dict, which stays as it is; a lazily read one stays lazy.
    """

    def __init__(self, state: StateDict) -> None:
        self._state = state

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return shape_of(self._state, name)

    def kind(self, name: str) -> str:
        """Kind of one tensor."""
        return kind_of(self._state, name)

    def dtype(self, name: str) -> str:
        """Dtype of one tensor."""
        return "float64" if self.kind(name) == "floating" else dtype_of(self._state, name)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """See :data:`lightning_merge.methods.low_rank.FactorsOf`."""
        factors_of: FactorsOf | None = getattr(self._state, "factors", None)
        found = factors_of(name) if factors_of else None
        return None if found is None else (found[0].double(), found[1].double())

    def __getitem__(self, name: str) -> Tensor:
        return widened(self._state[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def widened(value: Tensor) -> Tensor:
    """A floating-point tensor in float64, anything else as it is."""
    return value.double() if value.is_floating_point() else value
