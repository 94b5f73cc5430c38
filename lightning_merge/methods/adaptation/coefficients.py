"""What AdaMerging learns: a few kilobytes that, with base and experts, give the merged model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge.files import read_json, write_json, write_tensors
from lightning_merge.states import LazyStateDict

FORMAT = "AdaMerging coefficients"
VERSION = 1
TENSORS, MANIFEST = "coefficients.safetensors", "coefficients.json"
BY_TASK = ("entropy", "marginal_entropy")
"""Series of the history with a column for each task."""
COLLAPSED = 0.5
"""A task is taken to have collapsed below this share of the entropy its classes began with."""


@dataclass(frozen=True, kw_only=True)
class LearnedCoefficients:
    """Coefficients of task vectors by group of parameters and task, and how they were learned."""

    values: Tensor
    """``(G, K)`` float64."""
    groups: tuple[str, ...]
    """Names of the groups: parameters, blocks, or 'all'."""
    tasks: tuple[str, ...]
    unused: tuple[str, ...] = ()
    """Parameters that no task's predictions depend on."""
    history: Mapping[str, Tensor] = field(default_factory=dict)
    """By step: ``entropy`` and ``marginal_entropy`` (S, K) in nats, ``loss``, ``gradient_norm``
    (S,), and ``coefficients`` (S, 3): smallest, mean, largest. NaN where a step was skipped."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Provenance: protocol, hyper-parameters, fingerprints of data, base and experts, steps."""

    def collapsed(self) -> list[str]:
        """Tasks whose samples all came to be put into few classes, so that low entropy is no gain.

        Measured by the entropy of the mean prediction, at the end against the beginning.
        """
        marginal = self.history.get("marginal_entropy")
        if marginal is None or len(marginal) < 2:
            return []
        first, last = marginal[: max(1, len(marginal) // 10)].nanmean(0), marginal[-1]
        return [
            task for task, a, b in zip(self.tasks, first, last, strict=True) if b < COLLAPSED * a
        ]

    def save(self, folder: str | Path) -> None:
        """Write ``coefficients.safetensors`` and, last, ``coefficients.json`` into a folder."""
        files = self.files()
        write_tensors(Path(folder) / TENSORS, files[TENSORS])
        write_json(Path(folder) / MANIFEST, files[MANIFEST])

    def files(self) -> dict[str, dict[str, Any]]:
        """What :meth:`save` writes, by name of the file."""
        history = {f"history/{name}": value for name, value in self.history.items()}
        manifest = {
            "format": {"name": FORMAT, "version": VERSION},
            "tasks": list(self.tasks),
            "groups": list(self.groups),
            "unused": list(self.unused),
            "record": dict(self.record),
        }
        return {TENSORS: {"coefficients": self.values, **history}, MANIFEST: manifest}

    def summary(self) -> dict[str, Any]:
        """What fits into the manifest of a merged model."""
        told = ("protocol", "steps", "seconds", "lr", "peak_memory")
        low, mean, high = self.values.amin(0), self.values.mean(0), self.values.amax(0)
        return {
            **{name: self.record[name] for name in told if name in self.record},
            "coefficients": {
                task: {"lowest": float(a), "mean": float(b), "highest": float(c)}
                for task, a, b, c in zip(self.tasks, low, mean, high, strict=True)
            },
            "groups": len(self.groups),
            "unused": len(self.unused),
            "collapsed": self.collapsed(),
            "details": MANIFEST,
        }

    @classmethod
    def load(cls, folder: str | Path) -> "LearnedCoefficients":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If a file is missing, damaged, of another kind, or they don't belong
                together.
        """
        path = Path(folder)
        manifest = read_json(path / MANIFEST, FORMAT, VERSION)
        tensors = LazyStateDict(path / TENSORS)
        shape = (len(manifest["groups"]), len(manifest["tasks"]))
        if "coefficients" not in tensors or tensors.shape("coefficients") != shape:
            found = tensors.shape("coefficients") if "coefficients" in tensors else "none"
            raise ValueError(
                f"{path} should hold coefficients of shape {shape} (groups, tasks), found {found}: "
                "its two files are of different runs. Learn them again."
            )
        return cls.of(manifest, tensors)

    @classmethod
    def of(
        cls, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> "LearnedCoefficients":
        """The coefficients of what the two files hold."""
        return cls(
            values=tensors["coefficients"],
            groups=tuple(manifest["groups"]),
            tasks=tuple(manifest["tasks"]),
            unused=tuple(manifest["unused"]),
            history={
                name.removeprefix("history/"): tensors[name]
                for name in tensors
                if name.startswith("history/")
            },
            record=manifest["record"],
        )

    def fitted(self, groups: Sequence[str], tasks: Sequence[str]) -> "LearnedCoefficients":
        """These coefficients in the order of other groups and tasks.

        Raises:
            ValueError: If groups or tasks are not the same.
        """
        problems = [
            f"{what} {side}: {', '.join(sorted(names)[:5])}"
            for what, ours, theirs in (
                ("groups", set(self.groups), set(groups)),
                ("tasks", set(self.tasks), set(tasks)),
            )
            for side, names in (("without a use", ours - theirs), ("missing", theirs - ours))
            if names
        ]
        if problems:
            raise ValueError(
                f"the coefficients don't fit these experts: {'; '.join(problems)}. They were "
                f"learned for {len(self.groups)} groups of {', '.join(self.tasks)}; use the same "
                "experts and granularity, or learn new ones."
            )
        rows = torch.tensor([self.groups.index(group) for group in groups], dtype=torch.long)
        columns = torch.tensor([self.tasks.index(task) for task in tasks], dtype=torch.long)
        return LearnedCoefficients(
            values=self.values[rows][:, columns],
            groups=tuple(groups),
            tasks=tuple(tasks),
            unused=self.unused,
            history={
                name: series[:, columns] if name in BY_TASK else series
                for name, series in self.history.items()
            },
            record=self.record,
        )
