"""The gradient of one step: leaf weights, shared forward passes, one contraction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_merge.functional.adamerging import divergence, entropy
from lightning_merge.methods.adaptation.forward import Part, SharedNetwork, size_of
from lightning_merge.methods.adaptation.vectors import Vectors, combine_into, contract
from lightning_merge.methods.parts import live_parameters
from lightning_merge.states import StateDict

Loss: TypeAlias = Literal["entropy", "expert_kl", "both"]


@dataclass(frozen=True)
class TaskBatch:
    """One process's share of a task's samples of one step."""

    inputs: Any
    size: int
    """Samples of all processes: what means are taken over."""
    expert: Tensor | None = None
    """Class scores of the task's own expert on these samples, where the loss needs them."""


@dataclass
class Sums:
    """What one process adds to loss, entropies and predictions of one step."""

    loss: Tensor
    """``(K,)`` float64."""
    entropy: Tensor
    """``(K,)`` float64."""
    predictions: Tensor
    """``(K, C)`` float64: mean probability of every class."""
    gradient: Tensor
    """``(G, K)`` float64."""
    reached: Tensor
    """``(N,)`` float64: one for a parameter that had a gradient."""

    def flat(self) -> Tensor:
        """All in one vector, to be summed over processes in one go."""
        return torch.cat([part.flatten() for part in self._parts()])

    def filled(self, flat: Tensor) -> "Sums":
        """These sums with other values."""
        parts = self._parts()
        pieces = flat.split([part.numel() for part in parts])
        return Sums(*(piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)))

    def _parts(self) -> list[Tensor]:
        return [self.loss, self.entropy, self.predictions, self.gradient, self.reached]


@dataclass(frozen=True)
class MergedWeights:
    """The live parameters of a network, as a function of coefficients.

    The parameters are leaves of the graph: it never reaches through the merge.
    """

    network: nn.Module
    origin: StateDict
    """What task vectors are added to."""
    vectors: Vectors
    group_of: Mapping[str, int]
    """Row of the coefficients by parameter."""
    live: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        parameters = live_parameters(self.network)
        object.__setattr__(self, "live", {name: parameters[name] for name in self.group_of})
        for value in self.live.values():
            value.requires_grad_()

    def write(self, coefficients: Tensor, without: Sequence[str] = ()) -> None:
        """Fill the network for these coefficients; parameters in ``without`` get the origin."""
        for name, row in self.group_of.items():
            chosen = coefficients[row] * (name not in without)
            combine_into(self.live[name].data, name, self.origin[name], self.vectors, chosen)

    def gradient(self, num_groups: int, num_tasks: int) -> tuple[Tensor, Tensor]:
        """Gradients ``(G, K)`` from those of the parameters, which are freed, and who has one."""
        found = torch.zeros(num_groups, num_tasks, dtype=torch.float64)
        reached = torch.zeros(len(self.group_of), dtype=torch.float64)
        for index, (name, row) in enumerate(self.group_of.items()):
            value = self.live[name]
            if value.grad is not None:
                found[row] += contract(name, value.grad, self.vectors)
                reached[index] = 1
                value.grad = None
        return found, reached


def sums_of(
    shared: SharedNetwork,
    weights: MergedWeights,
    batches: Mapping[str, TaskBatch],
    tasks: Sequence[str],
    scales: Sequence[float],
    shape: tuple[int, int, int],
    loss: Loss,
    limit: int | None,
) -> Sums:
    """Run this process's samples forward and backward, and contract the gradient once.

    Args:
        shared: The network and the heads.
        weights: Its parameters, filled.
        batches: Samples by task; tasks without any are left out.
        tasks: All tasks, in the order of the results.
        scales: Factor of each task's loss.
        shape: Groups, tasks and the largest number of classes.
        loss: Which loss.
        limit: Samples a forward pass, at most; None: all.
    """
    groups, number, classes = shape
    loss_sum, entropies = (torch.zeros(number, dtype=torch.float64) for _ in range(2))
    predictions = torch.zeros(number, classes, dtype=torch.float64)
    parts = [Part(t, b.inputs, slice(0, size_of(b.inputs))) for t, b in batches.items()]
    for group in shared.grouped(parts, limit):
        total: Tensor | float = 0.0
        for part, logits in zip(group, shared.logits(group), strict=True):
            index, batch = tasks.index(part.task), batches[part.task]
            uncertainty = entropy(logits)
            each = uncertainty if loss != "expert_kl" else torch.zeros_like(uncertainty)
            if loss != "entropy":
                assert batch.expert is not None
                each = each + divergence(logits, batch.expert[part.rows])
            mean = each.sum() * (scales[index] / batch.size)
            total = total + mean
            loss_sum[index] += float(mean.detach())
            entropies[index] += float(uncertainty.detach().sum()) / batch.size
            probabilities = logits.detach().double().softmax(1).sum(0).cpu() / batch.size
            predictions[index, : len(probabilities)] += probabilities
        assert isinstance(total, Tensor)
        total.backward()
    return Sums(loss_sum, entropies, predictions, *weights.gradient(groups, number))
