"""What a merge can keep, from calibration inputs alone: by layer, by basis, and altogether."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_merge.files import replacing, write_json
from lightning_merge.functional.preference import Preference, as_preference
from lightning_merge.layers.collecting import Collecting
from lightning_merge.layers.sites import Kind
from lightning_merge.layers.statistics import Sampling
from lightning_merge.merge_errors import MergeError, merge_errors
from lightning_merge.merging import calibration_for
from lightning_merge.methods import Average, TaskArithmetic, WeightMethod
from lightning_merge.methods.buffers import knowing_buffers
from lightning_merge.methods.layer_diagnosis import (
    BASES,
    LayerDiagnosis,
    diagnose_layers,
    energy_mean,
)
from lightning_merge.methods.layerwise import LayerWalk
from lightning_merge.methods.projection import ALL_KINDS
from lightning_merge.networks import floating_buffers
from lightning_merge.pool import ExpertPool
from lightning_merge.runtime import Runtime
from lightning_merge.selecting import brief

PAYS = 0.02
"""A dearer basis is recommended if it captures at least this much more on folds left out."""
FORMAT = "lightning_merge.diagnosis"


@dataclass(frozen=True)
class Diagnosis:
    """The residual energy of every layer and what becomes of it."""

    tasks: list[str]
    layers: list[LayerDiagnosis]
    left: Mapping[str, str]
    """Modules that were not diagnosed, and why."""
    merges: Mapping[str, MergeError]
    """Whole networks: ``base`` and every heuristic."""

    def score(self, basis: str, *, held_out: bool = True) -> float:
        """Share that a basis captures, the energy-weighted mean over layers."""
        return energy_mean(self.layers, lambda x: (x.held_out if held_out else x.in_sample)[basis])

    def heuristic(self, name: str) -> float:
        """Share that a heuristic captures, the energy-weighted mean over layers."""
        return energy_mean(self.layers, lambda layer: layer.heuristics[name])

    @property
    def basis(self) -> str:
        """The cheapest basis that no dearer one beats by 0.02 on folds left out."""
        chosen = BASES[0]
        for name in BASES[1:]:
            if self.score(name) - self.score(chosen) >= PAYS:
                chosen = name
        return chosen

    def split(self, basis: str, heuristic: str) -> dict[str, float]:
        """Where the energy goes: conflict, price of the basis, and price of the heuristic."""
        full, own = self.score("full", held_out=False), self.score(basis, held_out=False)
        return {
            "irreducible_conflict": 1 - full,
            "price_of_the_basis": full - own,
            "price_of_the_heuristic": own - self.heuristic(heuristic),
            "captured_by_the_heuristic": self.heuristic(heuristic),
        }

    @property
    def best_merge(self) -> str:
        """The heuristic with the least error behind the heads, uncorrected."""
        names = [name for name in self.merges if name != "base"]
        return min(names, key=lambda name: self.merges[name].uncorrected)

    def recommendation(self) -> list[str]:
        """What to do, in sentences."""
        best, base = self.best_merge, self.merges["base"]
        merged = self.merges[best]
        lines = []
        gain = self.score(self.basis) - self.score("task_global")
        if self.basis == "task_global":
            lines.append(
                "One coefficient a task is enough: no finer basis captures 0.02 more on folds "
                "left out. Use TaskArithmetic with coefficients, or basis task_global."
            )
        else:
            lines.append(
                f"Use OutputProjection with basis {self.basis}: on folds left out it captures "
                f"{self.score(self.basis):.2f} of the residual energy, {gain:.2f} more than one "
                "coefficient a task."
            )
        row = max(self.score("rotated_row"), self.score("full")) - self.score("row")
        verdict = "pays" if row >= PAYS else "does not pay"
        lines.append(
            f"A basis dearer than row {verdict}: it captures {row:+.2f} on folds left out."
        )
        if merged.uncorrected >= base.uncorrected:
            lines.append(
                f"Of the merges tried, none is nearer to the experts than the base (error "
                f"{merged.uncorrected:.2f} against {base.uncorrected:.2f}): such a merge does harm."
            )
        if base.corrected <= merged.corrected:
            lines.append(
                "With a correction of its own for each task the base is as near to the experts as "
                f"the best merge is ({base.corrected:.2f} against {merged.corrected:.2f}): merging "
                "adds nothing that the correction does not give."
            )
        else:
            lines.append(
                f"Merging is worth it: with a correction for each task the error is "
                f"{merged.corrected:.2f} after {best}, {base.corrected:.2f} from the base."
            )
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what is not a number is null."""
        names = list(next((layer.heuristics for layer in self.layers), {}))
        network = {
            "in_sample": {name: self.score(name, held_out=False) for name in BASES},
            "held_out": {name: self.score(name) for name in BASES},
            "heuristics": {name: self.heuristic(name) for name in names},
            "split": {name: self.split(self.basis, name) for name in names},
        }
        content = {
            "format": FORMAT,
            "version": 1,
            "tasks": self.tasks,
            "recommended_basis": self.basis,
            "recommendation": self.recommendation(),
            "network": network,
            "representation": {
                name: {
                    "uncorrected": error.uncorrected,
                    "corrected_per_task": error.corrected,
                    "tasks": {
                        task: {"uncorrected": e.identity, "corrected": e.corrected}
                        for task, e in error.tasks.items()
                    },
                }
                for name, error in self.merges.items()
            },
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "energy": layer.energy,
                    "irreducible_conflict": layer.irreducible,
                    "in_sample": dict(layer.in_sample),
                    "held_out": dict(layer.held_out),
                    "heuristics": dict(layer.heuristics),
                }
                for layer in self.layers
            ],
            "not_diagnosed": dict(self.left),
        }
        plain: dict[str, Any] = _plain(content)
        return plain

    def table(self) -> str:
        """One row a layer, as CSV."""
        names = list(next((layer.heuristics for layer in self.layers), {}))
        header = ["layer", "kind", "energy", "irreducible_conflict"]
        header += [f"in_sample/{b}" for b in BASES] + [f"held_out/{b}" for b in BASES]
        header += [f"heuristic/{name}" for name in names]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        for layer in self.layers:
            values = [layer.energy, layer.irreducible]
            values += [layer.in_sample[b] for b in BASES] + [layer.held_out[b] for b in BASES]
            values += [layer.heuristics[name] for name in names]
            writer.writerow([layer.name, layer.kind, *(f"{value:.6g}" for value in values)])
        return text.getvalue()

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``layers.csv`` and ``diagnosis.json`` into a folder; returns their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "layers.csv") as temporary:
            temporary.write_text(self.table(), encoding="utf-8")
        write_json(folder / "diagnosis.json", self.as_dict())
        return [folder / "layers.csv", folder / "diagnosis.json"]


def diagnose_experts(
    experts: ExpertPool | Mapping[str, nn.Module],
    calibration: Mapping[str, Any] | None = None,
    *,
    heuristics: Sequence[WeightMethod] = (),
    layers: Sequence[Kind] = ALL_KINDS,
    preference: Preference | None = None,
    num_folds: int = 5,
    tokens_per_sample: int | None = 64,
    num_samples: int | None = None,
    base: nn.Module | None = None,
    head: str | None = None,
    module: nn.Module | None = None,
    tasks: Sequence[str] | None = None,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    runtime: Runtime | None = None,
) -> Diagnosis:
    """Tell what merging these experts can keep, from unlabeled calibration inputs.

    One pass of every expert gives the layers; one more, beside a pass of the base and of each
    heuristic, gives the errors of whole networks, which are in memory at once.

    Args:
        experts: A pool; or fine-tuned networks by task, with ``base`` and ``head``.
        calibration: Unlabeled inputs by task; the pool's own by default.
        heuristics: Methods to compare with; the average and task arithmetic (0.3) by default.
        layers: Kinds of layers to diagnose.
        preference: Weights of the tasks; equal by default.
        num_folds: Folds for the held-out shares.
        tokens_per_sample: At most as many columns of each sample.
        num_samples: At most as many calibration samples of each task, evenly spread; all by
            default. The time of all passes is in proportion.
        base: As for :func:`~lightning_merge.merge_experts`.
        head: As for ``merge_experts``.
        module: As for ``merge_experts``.
        tasks: As for ``merge_experts``.
        batch_size: As for ``merge_experts``.
        device: As for ``merge_experts``.
        runtime: As for ``merge_experts``.

    Raises:
        ValueError: As ``merge_experts`` and ``OutputProjection`` do.
    """
    methods = list(heuristics) or [Average(), TaskArithmetic(scale=0.3)]
    given = calibration_for(
        experts,
        calibration,
        base=base,
        head=head,
        module=module,
        tasks=tasks,
        batch_size=batch_size,
        runtime=runtime or Runtime(device=torch.device(device or "cpu")),
    )
    given = replace(given, calibration=given.calibration.with_at_most(num_samples))
    walk = LayerWalk(
        given.base,
        given.experts,
        given.calibration,
        Average(),
        layers,
        Collecting(
            sampling=Sampling(num_folds=num_folds, tokens_per_sample=tokens_per_sample),
            bias=True,
            residual_gram=True,
        ),
    )
    names = list(given.experts)
    buffers = floating_buffers(walk.network, given.base)
    informed = {brief(method): knowing_buffers(method, buffers) for method in methods}
    states = {name: method.merge(given.base, given.experts) for name, method in informed.items()}
    equal = dict.fromkeys(names, 1.0)
    found = diagnose_layers(
        walk,
        walk.expert_statistics(),
        states,
        as_preference(equal if preference is None else preference, names),
    )
    merges = merge_errors(given, {"base": given.base, **states})
    return Diagnosis(tasks=names, layers=found, left=walk.found.left, merges=merges)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
