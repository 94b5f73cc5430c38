"""The tailored model: one merged backbone with a folded head for every task."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_merge.networks import build_head, call_network, first_linear, set_submodule


def folded_head(head: nn.Module, path: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Copy a head with new values in its first linear layer, in that layer's dtype.

    Args:
        head: The expert's head; it is not changed.
        path: Its path in the network, for messages.
        weight: Folded weight ``(K, d)``.
        bias: Folded bias ``(K,)``, or ``None``.
    """
    name, layer = first_linear(head, path)
    prefix = f"{name}." if name else ""
    state = dict(head.state_dict())
    state[f"{prefix}weight"] = weight.to(layer.weight)
    if bias is not None:
        state[f"{prefix}bias"] = bias.to(layer.weight)
    return build_head(head, state).train(head.training)


class SteeredModel(nn.Module):
    """One backbone with the heads of all tasks, tailored to one preference.

    Args:
        network: Network with the merged backbone; it is taken over.
        head: Dotted path of its head, where the heads of the tasks go.
        heads: Folded head of every task.
        preference: The preference it was made for, by task; empty if uncorrected.
    """

    def __init__(
        self,
        network: nn.Module,
        head: str,
        heads: Mapping[str, nn.Module],
        preference: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.tasks = tuple(heads)
        self.preference = dict(preference)
        self._switch = [_HeadSwitch(heads)]  # in a list: it is registered once, in the network
        set_submodule(network, head, self._switch[0])
        self.network = network

    def forward(self, inputs: Any, task: str | None = None) -> Any:
        """Run the model.

        Args:
            inputs: One batch, as the experts take it.
            task: Task whose head answers; ``None`` for all tasks.

        Returns:
            The output of the task's model, or such outputs by task. All tasks cost one pass
            through the backbone where the network returns its head's output as it is.

        Raises:
            ValueError: If the task is unknown.
        """
        switch = self._switch[0]
        if task is not None:
            if task not in self.tasks:
                raise ValueError(f"unknown task '{task}'; known: {', '.join(self.tasks)}.")
            return switch.run(self.network, inputs, self.tasks.index(task))
        first = switch.run(self.network, inputs, 0, keep=True)
        if first is switch.output:
            rest = [switch.again(index) for index in range(1, len(self.tasks))]
        else:  # the network does something after its head
            rest = [switch.run(self.network, inputs, index) for index in range(1, len(self.tasks))]
        switch.forget()
        return dict(zip(self.tasks, [first, *rest], strict=True))


class _HeadSwitch(nn.Module):
    """The heads of all tasks in the place of one; can answer again for another task."""

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads.values())
        self.active = 0
        self.keep = False
        self.output: Any = None
        self._args: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.heads[self.active](*args, **kwargs)
        if self.keep:
            self.output, self._args = output, (args, kwargs)
        return output

    def run(self, network: nn.Module, inputs: Any, index: int, keep: bool = False) -> Any:
        """Run the whole network with one head; ``keep`` what the head was given and returned."""
        self.active, self.keep = index, keep
        return call_network(network, inputs)

    def again(self, index: int) -> Any:
        """Output of another head on what was kept."""
        args, kwargs = self._args
        return self.heads[index](*args, **kwargs)

    def forget(self) -> None:
        """Let go of what was kept."""
        self.output = None
        self._args = ((), {})
