"""Diagonal Fisher information of a network: squares of per-sample gradients, summed."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_merge.functional.fisher import expected_squares, sampled_squares
from lightning_merge.networks import call_network, logits_of

Gradients: TypeAlias = dict[str, Tensor]


def batch_of_one(sample: Any) -> Any:
    """One sample, a tensor or named tensors, as a batch."""
    if isinstance(sample, Mapping):
        return {name: value.unsqueeze(0) for name, value in sample.items()}
    return sample.unsqueeze(0)


class SquaredGradients:
    """Sums of Fisher information over samples, of some parameters of one network.

    Gradients of several samples are taken at once by ``vmap``. Where a network cannot run in it
    (control flow that depends on values, custom autograd functions), samples go one by one: slower,
    and the same result. A warning says so.

    Args:
        network: In eval mode; its parameters are not changed.
        parameters: Names, in the network, of the parameters wanted.
    """

    def __init__(self, network: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self.network = network.requires_grad_(False)
        self.parameters = {name: value.detach() for name, value in parameters.items()}
        self.vectorized = True

    def sum_of(self, batch: Any, uniforms: Tensor | None) -> Gradients:
        """Fisher information summed over a batch.

        Args:
            batch: ``(n, ...)``, a tensor or named tensors, on the network's device.
            uniforms: ``(n, draws)`` numbers that draw labels; None: exact over the classes.
        """
        failure = None
        if self.vectorized:
            each = vmap(self._vectorized, in_dims=(0, None if uniforms is None else 0))
            try:
                # of the kernels of attention this one alone has rules for vmap
                with sdpa_kernel(SDPBackend.MATH):
                    return {name: value.sum(0) for name, value in each(batch, uniforms).items()}
            except (RuntimeError, ValueError, NotImplementedError) as error:
                failure = str(error).split("\n")[0]
        found = self._one_by_one(batch, uniforms)  # what is wrong with the batch shows up here
        if failure is not None:
            self.vectorized = False
            warnings.warn(
                f"{type(self.network).__name__} cannot run in torch.func.vmap ({failure}): "
                "gradients are taken sample by sample, which is slower.",
                stacklevel=2,
            )
        return found

    def _vectorized(self, sample: Any, uniforms: Tensor | None) -> Gradients:
        def log_probabilities(parameters: Gradients) -> Tensor:
            batch = batch_of_one(sample)
            args, kwargs = ((), batch) if isinstance(batch, dict) else ((batch,), {})
            output = functional_call(self.network, parameters, args, kwargs)
            return logits_of(output).float().log_softmax(1)[0]

        scores, pull = vjp(log_probabilities, self.parameters)[:2]
        return _squares(scores, lambda label: pull(label)[0], uniforms)

    def _one_by_one(self, batch: Any, uniforms: Tensor | None) -> Gradients:
        live = dict(self.network.named_parameters())
        wanted = [live[name].requires_grad_() for name in self.parameters]
        total: Gradients = {}
        size = len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch)
        for index in range(size):
            sample = _sample(batch, index)
            with torch.enable_grad():
                scores = logits_of(call_network(self.network, sample)).float().log_softmax(1)[0]
            pull = partial(self._gradients, scores, wanted)
            drawn = None if uniforms is None else uniforms[index]
            for name, value in _squares(scores.detach(), pull, drawn).items():
                total[name] = total[name] + value if name in total else value
        self.network.requires_grad_(False)
        return total

    def _gradients(self, scores: Tensor, wanted: list[Tensor], label: Tensor) -> Gradients:
        found = torch.autograd.grad(
            scores, wanted, label, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return dict(zip(self.parameters, found, strict=True))


def _sample(batch: Any, index: int) -> Any:
    rows = slice(index, index + 1)
    if isinstance(batch, Mapping):
        return {name: value[rows] for name, value in batch.items()}
    return batch[rows]


def _squares(
    scores: Tensor, pull: Callable[[Tensor], Gradients], uniforms: Tensor | None
) -> Gradients:
    if uniforms is None:
        return expected_squares(scores, pull)
    return sampled_squares(scores, pull, uniforms)
