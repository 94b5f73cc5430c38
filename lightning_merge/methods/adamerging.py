"""AdaMerging: coefficients of task vectors, learned from unlabeled inputs."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from lightning_merge.functional.adamerging import Granularity, group_of
from lightning_merge.methods.adaptation.coefficients import LearnedCoefficients
from lightning_merge.methods.adaptation.forward import SharedNetwork
from lightning_merge.methods.adaptation.gradients import Loss, MergedWeights
from lightning_merge.methods.adaptation.learner import Learner
from lightning_merge.methods.adaptation.sampling import checked_digest
from lightning_merge.methods.adaptation.vectors import (
    KeptVectors,
    Storage,
    StreamedVectors,
    Vectors,
    plain_task_vectors,
)
from lightning_merge.methods.base import WeightMethod
from lightning_merge.methods.calibrated import CalibratedMethod, Calibration
from lightning_merge.methods.checks import check_density
from lightning_merge.methods.outcome import Outcome, PlannedTreatment, as_plain
from lightning_merge.methods.parts import (
    Parts,
    check_inputs,
    completed,
    known_of_buffer,
    parts_of,
    treatments_of,
)
from lightning_merge.methods.ties import TIES, agreeing_task_vectors
from lightning_merge.networks import load_backbone
from lightning_merge.states import StateDict, check_compatible, check_finite, fingerprint

FIRST = 0.3
"""Coefficient to begin with, as in the paper."""


@final
@dataclass(frozen=True, kw_only=True)
class AdaMerging(CalibratedMethod):
    """Learns how much of each expert to add, by layer, so that predictions become certain.

    Labels are never read: there are none in the calibration. The experts, the base and the heads
    are not changed.
    """

    granularity: Granularity = "tensor"
    """What shares a coefficient a task: each tensor ('layer-wise'), a block, or all ('task')."""

    vectors: Literal["plain", "ties"] = "plain"
    """Task vectors as they are, or trimmed and with agreeing signs alone: AdaMerging++."""

    density: float = 0.2
    """Fraction of the entries of a task vector that AdaMerging++ keeps, in (0, 1]."""

    loss: Loss = "entropy"
    """Entropy of the predictions (the paper), divergence from the task's own expert, or both."""

    normalize: bool = False
    """Divide a task's loss by the logarithm of its classes, so that many don't count for more."""

    start: WeightMethod | None = None
    """Learn on top of this method's merge; null: on top of the base."""

    init: float | None = None
    """Coefficient to begin with; null: 0.3, or 0 on top of another merge."""

    lr: float = 1e-3
    """Learning rate of Adam; about the change of a coefficient in one step."""

    steps: int = 500
    """Steps, at most."""

    batch_size: int = 16
    """Samples of each task in a step."""

    patience: int | None = 100
    """Stop after so many steps without a lower running mean of the loss; null: never."""

    bounds: tuple[float, float] | None = None
    """Coefficients are moved back into this range after a step; null: no bounds."""

    seed: int = 0
    """Of the order of the samples."""

    max_images_per_forward: int | None = None
    """Samples a forward pass, of all tasks together: less memory, same result; null: all."""

    storage: Storage = "exact"
    """Task vectors in memory: exactly, in half the bytes, or read anew in every step."""

    unused: Literal["keep", "zero"] = "keep"
    """Parameters that get no gradient keep their first coefficient, or stay as in the base."""

    bn: Literal["shared", "average", "base"] = "shared"
    """Running statistics of batch norms while learning: estimated anew, averaged, or the base's."""

    bn_every: int = 50
    """Steps after which they are estimated anew."""

    protocol: Literal["inductive", "transductive"] = "inductive"
    """What the record says of the inputs: apart from the test inputs, or these themselves.
    Coefficients from a file bring their own."""

    state_path: str | None = None
    """File of the state, from which a killed run continues; null: none."""

    save_every: int = 25
    """Steps after which the state is written."""

    save: str | None = None
    """Folder for the learned coefficients and their history; null: they are not kept."""

    coefficients: str | None = None
    """Folder of coefficients to use again, instead of learning some; needs no inputs."""

    def __post_init__(self) -> None:
        check_density(self.density)
        for name in ("batch_size", "bn_every", "save_every", "patience", "max_images_per_forward"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}.")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, found {self.steps}.")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be a positive number, found {self.lr}.")
        if not math.isfinite(self.first_coefficient):
            raise ValueError(f"init must be a finite number, found {self.init}.")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds must be a smaller and a larger number, found {self.bounds}.")
        if self.storage == "stream" and self.vectors == "ties":
            raise ValueError(
                "trimmed task vectors cannot be read anew in every step: with vectors='ties' use "
                "storage='exact', 'bfloat16' or 'float16'."
            )

    @property
    def first_coefficient(self) -> float:
        """Where all coefficients begin."""
        if self.init is not None:
            return self.init
        return FIRST if self.start is None else 0.0

    def merge(
        self, base: StateDict, experts: Mapping[str, StateDict], calibration: Calibration
    ) -> dict[str, Tensor]:
        """Learn the coefficients, or read them, and merge.

        Buffers are averaged over the experts.

        Raises:
            ValueError: If base, experts and networks do not fit, calibration inputs are missing or
                not finite, a head has fewer than two classes, or coefficients from a file are for
                other experts.
        """
        return self.outcome(base, experts, calibration).state

    def outcome(
        self, base: StateDict, experts: Mapping[str, StateDict], calibration: Calibration
    ) -> Outcome:
        """Merge as :meth:`merge` does, and tell the coefficients with how they were learned.

        Those from a file bring their protocol with them.
        """
        weights, shared, parts = self._prepare(base, experts, calibration)
        learned = self._learned(base, experts, calibration, weights, shared)
        without = learned.unused if self.unused == "zero" else ()
        weights.write(learned.values, without)
        return Outcome(
            state=completed(weights.live, parts, base, experts),
            method=replace(self, protocol=learned.record.get("protocol", self.protocol)),
            found=as_plain(learned.summary()),
            files=learned.files(),
            treatments=treatments_of(parts),
        )

    def known_treatment(self, name: str, shape: tuple[int, ...], kind: str) -> PlannedTreatment:
        """Buffers are averaged or kept; parameters need the data."""
        return known_of_buffer(name, kind)

    @property
    def needs_inputs(self) -> bool:
        """Coefficients from a file need none."""
        return self.coefficients is None

    def learn(
        self, base: StateDict, experts: Mapping[str, StateDict], calibration: Calibration
    ) -> LearnedCoefficients:
        """The coefficients alone, with their history; arguments as for :meth:`merge`."""
        weights, shared, _ = self._prepare(base, experts, calibration)
        return self._learned(base, experts, calibration, weights, shared)

    def _prepare(
        self, base: StateDict, experts: Mapping[str, StateDict], calibration: Calibration
    ) -> tuple[MergedWeights, SharedNetwork, Parts]:
        check_compatible(base, experts)
        if self.needs_inputs:
            check_inputs(experts, calibration.inputs, "AdaMerging")
        shared = SharedNetwork(calibration, tuple(experts))
        parts = parts_of(shared.network, calibration.head, base)
        self._fill_buffers(shared, parts, base, experts)
        groups = self._groups(parts)
        weights = MergedWeights(
            network=shared.network,
            origin=self._origin(base, experts, parts, calibration.runtime.device),
            vectors=self._vectors(base, experts, parts, calibration.runtime.device),
            group_of={n: groups.index(group_of(n, self.granularity)) for n in parts.parameters},
        )
        return weights, shared, parts

    def _learned(
        self,
        base: StateDict,
        experts: Mapping[str, StateDict],
        calibration: Calibration,
        weights: MergedWeights,
        shared: SharedNetwork,
    ) -> LearnedCoefficients:
        names = {group_of(name, self.granularity): None for name in weights.group_of}
        if self.coefficients is not None:
            return self._again(tuple(names), tuple(experts))
        provenance = self._provenance(base, experts, calibration)
        identity = json.dumps(provenance, sort_keys=True)
        learner = Learner(self, calibration, shared, weights, tuple(names), identity)
        learned = learner.learn()
        record = {**provenance, **learned.record}
        learned = LearnedCoefficients(**{**vars(learned), "record": record})
        if self.save is not None and calibration.runtime.is_first:
            learned.save(self.save)
        return learned

    def _again(self, groups: tuple[str, ...], tasks: tuple[str, ...]) -> LearnedCoefficients:
        assert self.coefficients is not None
        learned = LearnedCoefficients.load(self.coefficients)
        used = learned.record.get("method", {})
        own = self._choices()
        problems = [
            f"{name} {used[name]!r}, here {own[name]!r}"
            for name in ("vectors", "density", "start")
            if name in used
            and used[name] != own[name]
            and (name != "density" or self.vectors == "ties")
        ]
        if problems:
            raise ValueError(
                f"{self.coefficients} was learned with other task vectors: {'; '.join(problems)}. "
                "Give the method the same."
            )
        return learned.fitted(groups, tasks)

    def _groups(self, parts: Parts) -> list[str]:
        return list({group_of(name, self.granularity): None for name in parts.parameters})

    def _origin(
        self,
        base: StateDict,
        experts: Mapping[str, StateDict],
        parts: Parts,
        device: torch.device,
    ) -> StateDict:
        origin = base if self.start is None else self.start.merge(base, experts)
        if device.type == "cpu" or self.storage == "stream":
            return origin
        return {name: origin[name].detach().to(device) for name in parts.parameters}

    def _vectors(
        self,
        base: StateDict,
        experts: Mapping[str, StateDict],
        parts: Parts,
        device: torch.device,
    ) -> Vectors:
        if self.vectors == "ties":
            method = TIES(density=self.density, include=parts.parameters)
            return KeptVectors(agreeing_task_vectors(method, base, experts), self.storage, device)
        plain = plain_task_vectors(base, experts, parts.parameters)
        if self.storage != "stream":
            return KeptVectors(plain, self.storage, device)
        for name in parts.parameters:
            for owner, state in (
                ("the base", base),
                *((f"expert '{t}'", experts[t]) for t in experts),
            ):
                check_finite(name, owner, state[name])
        return StreamedVectors(base, experts, device)

    def _fill_buffers(
        self,
        shared: SharedNetwork,
        parts: Parts,
        base: StateDict,
        experts: Mapping[str, StateDict],
    ) -> None:
        if self.bn != "base" and parts.averaged:
            merged = {name: base[name] for name in parts.parameters}
            averaged = completed(merged, parts, base, experts)
            load_backbone(shared.network, averaged, shared.path)

    def _choices(self) -> dict[str, Any]:
        """Hyper-parameters that decide the result, as plain data."""
        kept = asdict(self)
        for name in ("steps", "max_images_per_forward", "state_path", "save_every", "save"):
            del kept[name]
        if self.start is not None:
            kept["start"] = {"class": type(self.start).__name__, **kept["start"]}
        kept["bounds"] = None if self.bounds is None else list(self.bounds)
        return json.loads(json.dumps(kept))

    def _provenance(
        self, base: StateDict, experts: Mapping[str, StateDict], calibration: Calibration
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"protocol": self.protocol, "method": self._choices()}
        found["data"] = {t: checked_digest(t, calibration.inputs[t]) for t in experts}
        if self.state_path is not None or self.save is not None:
            found["base"] = fingerprint(base)
            found["experts"] = {task: fingerprint(expert) for task, expert in experts.items()}
        return found
