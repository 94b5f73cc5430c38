"""The interference of experts, parameter by parameter, for reports and pictures."""

from collections.abc import Iterator, Mapping

from lightning_merge.functional.interference import Interference, interference
from lightning_merge.methods.base import WeightMethod
from lightning_merge.states import StateDict, check_compatible


def measure_interference(
    method: WeightMethod, base: StateDict, experts: Mapping[str, StateDict]
) -> Iterator[tuple[str, Interference]]:
    """Yield name and interference of each parameter that the method merges.

    Reads one parameter of all experts at a time.

    Args:
        method: Its patterns and coefficients decide which parameters count, and how much.
        base: The pre-trained weights.
        experts: Fine-tuned weights by task.

    Raises:
        ValueError: If the experts do not fit the base, or a value is not finite.
    """
    check_compatible(base, experts)
    for name in method.method_names(base):
        yield name, interference(base[name].detach(), method.task_vectors(name, base, experts))
