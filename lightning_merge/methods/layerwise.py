"""The walk of every method that solves layers on their inputs: all at once, or one by one."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_merge.layers.collecting import Collecting, expert_sums, group_sums
from lightning_merge.layers.coordinates import Coordinates
from lightning_merge.layers.problem import LayerProblem, layer_problem
from lightning_merge.layers.sites import Kind, Site, Sites, find_sites
from lightning_merge.layers.statistics import LayerSums
from lightning_merge.layers.streams import CacheOptions, Stream
from lightning_merge.layers.tracing import Group, Trace, trace
from lightning_merge.methods.average import Average
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.calibrated import Calibration
from lightning_merge.networks import load_backbone, named_state
from lightning_merge.runtime import Runtime
from lightning_merge.states import StateDict, check_compatible, tied_names

Solve = Callable[[LayerProblem], Tensor]
"""Gives the update (g, o, i) of a layer from its problem, in the problem's coordinates."""
TRACED = 2
"""Samples that the order of the layers is traced on."""
BASE = "the base"
"""Name of its matrix among those that wide layers are written in."""


@dataclass(frozen=True)
class BatchesOf:
    """Calibration inputs in the form that the layers ask for."""

    calibration: Calibration

    @property
    def runtime(self) -> Runtime:
        """Where the work runs."""
        return self.calibration.runtime

    def slices(self, task: str) -> list[slice]:
        """This process's batches as slices of samples."""
        return self.calibration.slices(task)

    def batch(self, task: str, rows: slice) -> Any:
        """One batch, on the device."""
        return self.runtime.to_device(self.calibration.inputs[task][rows])


@dataclass(eq=False)
class LayerWalk:
    """A base, its experts and their inputs, seen layer by layer.

    Args:
        base: The pre-trained weights.
        experts: Fine-tuned weights by task.
        calibration: Networks and inputs, of which those count that ``options`` say.
        fallback: What merges all that is no layer of ``kinds``, and where a walk begins.
        kinds: Layers that are solved.
        options: What is collected of them.
        off_diagonal: RegMean's factor of the off-diagonal second moments.
        max_inputs: Layers with more inputs of an output are wide: their second moments would not
            fit in memory.
        heuristics: Methods whose updates are known to the solution.
        solve_wide: Solve wide layers from the outputs of the task vectors, the fallback's update
            and the heuristics', for solutions that combine these; else they are left to the
            fallback, with a warning.
    """

    base: StateDict
    experts: Mapping[str, StateDict]
    calibration: Calibration
    fallback: WeightMethod
    kinds: Sequence[Kind]
    options: Collecting
    off_diagonal: float = 1.0
    max_inputs: int = 8192
    heuristics: Sequence[WeightMethod] = ()
    solve_wide: bool = False
    state: dict[str, Tensor] = field(init=False)
    """The merged weights so far."""
    renormalised: set[str] = field(default_factory=set, init=False)
    """Running statistics that are those of what reaches the merged layers."""
    found: Sites = field(init=False)
    order: Trace = field(init=False)

    def __post_init__(self) -> None:
        check_compatible(self.base, self.experts)
        missing = [task for task in self.experts if task not in self.calibration.inputs]
        if missing:
            raise ValueError(
                f"no calibration inputs for {', '.join(missing)}: give some for every task."
            )
        self.calibration = self.calibration.with_at_most(self.options.sampling.samples)
        network = self.network
        found = find_sites(network, self.calibration.head, list(self.base), self.kinds)
        self.found = self._within(found)
        inputs = self.calibration.inputs[next(iter(self.experts))]
        batch = self.calibration.runtime.to_device(inputs[slice(0, TRACED)])
        order = self.order = trace(network, self.found.handled, batch)
        self.found = self.found.without(order.refused)
        if self.found.unknown:
            warnings.warn(self.found.told(type(self.fallback).__name__), stacklevel=3)
        unused = {site.name: "it does not run on the calibration inputs" for site in order.unused}
        self.found = replace(self.found, left={**self.found.left, **unused})
        self.state = dict(self.fallback.merge(self.base, self.experts))
        kept = {
            name: self.state[name].clone()
            for site in self.sites
            for name in (*site.weights, *site.biases)
        }
        self._merges: dict[str, tuple[WeightMethod, StateDict]] = {
            "fallback": (self.fallback, kept)
        }
        for number, method in enumerate(self.heuristics):
            merged = method.merge(self.base, self.experts)
            self._merges[f"{type(method).__name__} {number}"] = (method, merged)
        self._coordinates = {
            site.name: Coordinates(site, self.shape(site), self._element_names, self._element)
            for site in self.sites
            if self._is_wide(site)
        }
        if self.order.unused:
            names = ", ".join(site.name for site in self.order.unused[:5])
            warnings.warn(
                f"{len(self.order.unused)} layers did not run on the calibration inputs and are "
                f"merged by {type(self.fallback).__name__}: {names}.",
                stacklevel=2,
            )

    def _is_wide(self, site: Site) -> bool:
        # An embedding's second moments are one number; a norm has two inputs.
        return site.kind not in ("embedding", "norm") and self.shape(site)[2] > self.max_inputs

    def _within(self, found: Sites) -> Sites:
        wide = {s.name: self.shape(s)[2] for s in found.handled if self._is_wide(s)}
        if not wide or self.solve_wide:
            return found
        warnings.warn(
            f"{len(wide)} layers have more than max_inputs={self.max_inputs} inputs and are merged "
            f"by {type(self.fallback).__name__}: {', '.join(list(wide)[:5])}. Raise max_inputs "
            "where memory allows.",
            stacklevel=4,
        )
        reasons = {name: f"{size} inputs, more than max_inputs" for name, size in wide.items()}
        handled = tuple(site for site in found.handled if site.name not in wide)
        return Sites(handled, {**found.left, **reasons}, found.unknown)

    @property
    def network(self) -> nn.Module:
        """A fresh network of the first task."""
        return self.calibration.network(next(iter(self.experts)))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Layers that are solved, in the order in which they run."""
        return self.order.sites

    def matrix(self, site: Site, task: str | None = None) -> Tensor:
        """Matrix of a layer in an expert, or in the base: (g, o, i), float64."""
        state = self.base if task is None else self.experts[task]
        return site.matrix(state, bias=self.options.bias)

    def shape(self, site: Site) -> tuple[int, int, int]:
        """Shape of a layer's matrix."""
        g, o, i = self.matrix(site).shape
        return g, o, i

    def coordinates(self, site: Site) -> Coordinates | None:
        """What a wide layer is solved in."""
        return self._coordinates.get(site.name)

    def updates(self, problem: LayerProblem) -> dict[str, Tensor]:
        """What the fallback (first) and each heuristic make of a layer, less the base.

        Raises:
            ValueError: If the layer is wide and its sums were collected with others.
        """
        site, given = problem.site, problem.coordinates
        found = {}
        for name, (method, state) in self._merges.items():
            if given is None:
                found[name] = site.matrix(state, bias=self.options.bias) - self.matrix(site)
                continue
            shares = _shares(method, tuple(self.experts)) or {repr(method): 1.0}
            found[name] = torch.stack([share * given.one(of) for of, share in shares.items()]).sum(
                0
            )
        return found

    def problem(self, site: Site, sums: Sequence[LayerSums]) -> LayerProblem:
        """The problem of a layer from the sums of every task; wide as the sums are."""
        tasks = list(self.experts)
        base, experts = self.matrix(site), [self.matrix(site, task) for task in tasks]
        given = None
        if names := sums[0].elements:
            given = Coordinates(site, self.shape(site), names, self._element)
            changed = [not torch.equal(expert, base) for expert in experts]
            base = given.one(BASE)
            experts = [base + c * given.one(_of(t)) for t, c in zip(tasks, changed, strict=True)]
        return layer_problem(
            site,
            base,
            experts,
            [one.to("cpu") for one in sums],
            residual_gram=self.options.residual_gram,
            off_diagonal=self.off_diagonal,
            coordinates=given,
        )

    @property
    def _element_names(self) -> tuple[str, ...]:
        tasks = tuple(self.experts)
        others = [repr(m) for m, _ in self._merges.values() if _shares(m, tasks) is None]
        return tuple(dict.fromkeys((BASE, *map(_of, tasks), *others)))

    def _element(self, site: Site, name: str) -> Tensor:
        if name == BASE:
            return self.matrix(site)
        states = {_of(task): state for task, state in self.experts.items()}
        states |= {repr(method): state for method, state in self._merges.values()}
        return site.matrix(states[name], bias=self.options.bias) - self.matrix(site)

    def expert_statistics(self) -> dict[str, list[LayerSums]]:
        """Sums of the experts' own inputs by layer, each a list over tasks; one pass a task."""
        inputs = BatchesOf(self.calibration)
        by_layer: dict[str, list[LayerSums]] = {site.name: [] for site in self.sites}
        for task in self.experts:
            network = self.calibration.network(task)
            sums = expert_sums(network, task, self.sites, inputs, self, self.options)
            for name, one in sums.items():
                by_layer[name].append(one.all_reduced(inputs.runtime.reduce).to("cpu"))
        return by_layer

    def write(self, problem: LayerProblem, update: Tensor) -> Tensor:
        """Set a layer to the base plus an update; returns the matrix."""
        site = problem.site
        if problem.coordinates is not None:
            update = problem.coordinates.lifted(update)
        merged = self.matrix(site) + update
        if not bool(merged.isfinite().all()):
            raise ValueError(f"layer '{site.name}': the solution holds NaN or infinity.")
        site.write(self.state, merged, bias=self.options.bias)
        return merged

    def finished(self) -> dict[str, Tensor]:
        """The merged weights, with the base's ties."""
        for later, first in tied_names(self.base).items():
            self.state[later] = self.state[first]
        return self.state

    def one_by_one(
        self,
        solve: Solve,
        *,
        expert_targets: bool,
        cache: CacheOptions = CacheOptions(),  # noqa: B008 (frozen)
        start: nn.Module | None = None,
        skip_fold: int | None = None,
    ) -> nn.Module:
        """Solve the layers in their order, each on what the merged network gives it so far.

        Args:
            solve: Solves one layer.
            expert_targets: Aim at the expert's activations on its own way through the network, so
                that the drift of earlier layers is corrected; else at the expert's outputs on the
                merged network's inputs.
            cache: Options of the block cache.
            start: Network to begin with; by default handled layers are the base's.
            skip_fold: Samples of this fold are left out.

        Returns:
            The merged network, on the runtime's device.
        """
        network = start or self._start()
        runtime = self.calibration.runtime
        tasks, inputs = tuple(self.experts), BatchesOf(self.calibration)
        merged = Stream(network, inputs, tasks, self.order.chained, cache)
        expert = None
        if expert_targets:
            scratch = self.network
            expert = Stream(
                scratch, inputs, tasks, self.order.chained, cache, load=self._loader(scratch)
            )
        groups = runtime.progress(self.order.groups, len(self.order.groups), "Merging layers")
        for group in groups:
            for stream in (merged, expert):
                if stream is not None:
                    stream.enter(group.block)
            sums = self._sums(group, merged, expert, skip_fold)
            for site in group.sites:
                problem = self.problem(site, sums[site.name])
                matrix = self.write(problem, solve(problem))
                self._follow(network, site, matrix, sums[site.name])
        return network

    def _start(self) -> nn.Module:
        """A network with the fallback's weights, and the base's in the layers to solve."""
        network = self.network
        state = dict(self.state)
        handled = {name for site in self.sites for name in (*site.weights, *site.biases)}
        for name in handled:
            state[name] = self.base[name]
        if not self.options.bias:
            for site in self.sites:
                for name in site.biases:
                    state[name] = self.state[name]
        load_backbone(network, state, self.calibration.head)
        return network

    def _loader(self, scratch: nn.Module) -> Callable[[str, str], None]:
        live = named_state(scratch)

        @torch.no_grad()
        def load(task: str, prefix: str) -> None:
            for name in self.base:
                if name.startswith(prefix) and name in live:
                    live[name].copy_(self.experts[task][name])

        return load

    def _sums(
        self, group: Group, merged: Stream, expert: Stream | None, skip_fold: int | None
    ) -> dict[str, list[LayerSums]]:
        reduce = self.calibration.runtime.reduce
        sums: dict[str, list[LayerSums]] = {site.name: [] for site in group.sites}
        for task in self.experts:
            found = group_sums(group, task, merged, expert, self, self.options, skip_fold)
            for site in group.sites:
                sums[site.name].append(found[site.name].all_reduced(reduce).to("cpu"))
        return sums

    @torch.no_grad()
    def _follow(
        self, network: nn.Module, site: Site, matrix: Tensor, sums: Sequence[LayerSums]
    ) -> None:
        """Bring the live network up to date with what was written."""
        module = network.get_submodule(site.modules[0])
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            self._renormalise(module, site, matrix, sums)
        live = named_state(network)
        for name in (*site.weights, *site.biases):
            live[name].copy_(self.state[name])

    def _renormalise(
        self, module: _BatchNorm, site: Site, matrix: Tensor, sums: Sequence[LayerSums]
    ) -> None:
        """Give a batch norm the statistics of its inputs, and leave its function as it was solved.

        The averaged statistics it starts with belong to no network. Re-estimation after the merge
        then finds what is here already.
        """
        assert module.running_mean is not None
        assert module.running_var is not None
        if not (self.options.bias and site.biases):
            return
        grams = [torch.stack(one.grams()).sum(0) / one.count for one in sums if one.count > 0]
        moments = torch.stack(grams).mean(0)  # tasks count alike, as in a mixed batch
        mean, second = moments[:, 0, 1], moments[:, 0, 0]
        variance = second - mean.square()
        old = module.running_var.double().cpu() + module.eps
        new_variance = (variance * old).clamp_min(0)
        factor = ((new_variance + module.eps) / old).sqrt()
        shift = matrix[:, 0, 1] + matrix[:, 0, 0] * mean
        renormalised = torch.stack([matrix[:, 0, 0] * factor, shift], -1)[:, None]
        site.write(self.state, renormalised, bias=self.options.bias)
        module.running_mean += (mean * old.sqrt()).to(module.running_mean)
        module.running_var.copy_(new_variance)
        for name in site.modules:
            self.state[f"{name}.running_mean"].copy_(module.running_mean)
            self.state[f"{name}.running_var"].copy_(module.running_var)
            self.renormalised |= {f"{name}.running_mean", f"{name}.running_var"}


def _of(task: str) -> str:
    return f"the task vector of {task}"


def _shares(method: WeightMethod, tasks: Sequence[str]) -> dict[str, float] | None:
    """What a plain average takes of each task vector, by its name; None for any other method.

    Its outputs need not be collected, so that statistics serve every preference.
    """
    if not isinstance(method, Average) or method != Average(weights=method.weights):
        return None
    weights = method.weights or dict.fromkeys(tasks, 1.0)
    total = math.fsum(weights.values())
    return {_of(task): weights[task] / total for task in tasks}
