"""What a sweep found: the metric of every task at every preference, beside its references."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from lightning_merge.files import replacing, write_json
from lightning_merge.pareto.fronts import check_values
from lightning_merge.pareto.summary import summarize, sweep_warnings

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("equal", "priority", "one_hot", "pairwise", "lattice", "response", "custom")
"""What a preference of a sweep was drawn for."""

REFERENCES = ("experts", "base", "uncorrected", "per_task")
"""Rows that a sweep compares with; all but the last are required."""

_METADATA = b"lightning_merge.sweep"
_FORMAT = 1


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class SweepResult:
    """The metric of every task at every preference, with what it is compared with.

    ``T`` tasks and ``P`` preferences; all numbers are float64 in the metric's own unit.
    """

    tasks: tuple[str, ...]
    """Names of the tasks, in the order of all columns."""
    metric: str
    """Name of the metric, for instance ``"accuracy"``."""
    preferences: Tensor
    """Weights ``(P, T)``, rows sum to one."""
    kinds: tuple[str, ...]
    """What each preference was drawn for, one of :data:`KINDS`."""
    favoured: tuple[str | None, ...]
    """The task that a one-hot, priority or response preference favours."""
    raw: Tensor
    """Metric ``(P, T)`` of the corrected model on each task."""
    references: Mapping[str, Tensor]
    """Metric ``(T,)`` of the experts, the base with the experts' heads, the uncorrected merge, and
    optionally of the model whose heads are each folded with their own map (``per_task``)."""
    method: str
    """The merge method, as a person reads it."""
    higher_is_better: bool = True
    """Whether a larger metric is better."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each stage."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the packages that took part."""
    diagnostics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Plain facts about the correction of each task, ``{task: {name: number or text}}``."""

    def __post_init__(self) -> None:
        self._check()
        for name in ("preferences", "raw"):
            object.__setattr__(self, name, getattr(self, name).detach().cpu().double())
        rows = {name: row.detach().cpu().double() for name, row in self.references.items()}
        object.__setattr__(self, "references", rows)

    @property
    def normalized(self) -> Tensor:
        """Share of the expert's performance, ``(P, T)``: one is the expert's, more is better."""
        return self.normalize(self.raw)

    def normalize(self, raw: Tensor) -> Tensor:
        """Compare ``(..., T)`` metrics with the experts': larger is better in either direction.

        ``raw / expert`` where higher is better, ``expert / raw`` where lower is: an error twice as
        large is half as good. NaN where the divisor or the expert is not positive (an R² below
        zero, a loss of zero): there is no share of it.
        """
        experts = self.references["experts"].expand_as(raw)
        if self.higher_is_better:
            return torch.where(experts > 0, raw / experts, torch.nan)
        return torch.where((experts > 0) & (raw > 0), experts / raw, torch.nan)

    @property
    def normalization(self) -> str:
        """What the normalized value is, for a reader."""
        return "value / expert" if self.higher_is_better else "expert / value"

    def rows(self) -> dict[str, Tensor]:
        """The reference rows of every report, metrics ``(T,)`` by name, in reading order.

        ``one_hot`` and ``priority`` hold each task under the preference that favours it. A row
        that the sweep did not evaluate is left out.
        """
        found: dict[str, Tensor | None] = {name: self.references[name] for name in REFERENCES[:3]}
        found |= {
            "equal": self._equal(),
            "priority": self._diagonal("priority"),
            "one_hot": self._diagonal("one_hot"),
            "per_task": self.references.get("per_task"),
        }
        return {name: row for name, row in found.items() if row is not None}

    def table(self) -> "pd.DataFrame":
        """One line for each preference: its weights, and the metric of each task, both ways."""
        import pandas as pd

        columns: dict[str, Any] = {"kind": self.kinds, "favoured": self.favoured}
        for prefix, values in (
            ("preference", self.preferences),
            ("raw", self.raw),
            ("normalized", self.normalized),
        ):
            columns |= {f"{prefix}/{t}": values[:, i].numpy() for i, t in enumerate(self.tasks)}
        columns["raw_mean"] = self.raw.mean(dim=1).numpy()
        columns["normalized_mean"] = self.normalized.mean(dim=1).numpy()
        return pd.DataFrame(columns)

    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``; ``None`` stands where a measure is not defined."""
        return self._summary

    def warnings(self) -> list[str]:
        """Plain sentences on what a reader must not overlook, worst first."""
        return sweep_warnings(self)

    def save(self, folder: str | Path) -> None:
        """Write ``results.parquet``, ``results.csv`` and last ``summary.json``, each in one step.

        Raises:
            OSError: If the folder cannot be written to.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = Path(folder)
        frame, summary = self.table(), self.summary()
        table = pa.Table.from_pandas(frame, preserve_index=False)
        metadata = {**(table.schema.metadata or {}), _METADATA: self._metadata().encode()}
        with replacing(folder / "results.parquet") as path:
            pq.write_table(table.replace_schema_metadata(metadata), path)
        with replacing(folder / "results.csv") as path:
            frame.to_csv(path, index=False)
        write_json(folder / "summary.json", summary)

    @classmethod
    def load(cls, folder: str | Path) -> "SweepResult":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If the folder holds no finished sweep, or one of a newer release.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(folder) / "results.parquet"
        if not path.exists() or not path.with_name("summary.json").exists():
            raise ValueError(
                f"{folder} holds no finished sweep (results.parquet and summary.json are written "
                "at its end). Check the path, or run `lightning-merge sweep`."
            )
        try:
            table = pq.read_table(path)
            facts = json.loads((table.schema.metadata or {})[_METADATA])
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} is not a readable sweep ({type(error).__name__}: {error}). Run the sweep "
                "again."
            ) from error
        if facts.pop("format") > _FORMAT:
            raise ValueError(
                f"{path} is of a newer format than this release reads. Upgrade lightning-merge: "
                "pip install -U lightning-merge."
            )
        return cls._restored(table, facts)

    @classmethod
    def _restored(cls, table: Any, facts: dict[str, Any]) -> "SweepResult":
        def matrix(prefix: str) -> Tensor:
            columns = [table[f"{prefix}/{task}"].to_pylist() for task in facts["tasks"]]
            return torch.tensor(columns, dtype=torch.float64).T.contiguous()

        references = {
            name: torch.tensor(row, dtype=torch.float64)
            for name, row in facts.pop("references").items()
        }
        return cls(
            preferences=matrix("preference"),
            raw=matrix("raw"),
            kinds=tuple(table["kind"].to_pylist()),
            favoured=tuple(table["favoured"].to_pylist()),
            references=references,
            tasks=tuple(facts.pop("tasks")),
            **facts,
        )

    def _metadata(self) -> str:
        facts = {
            "format": _FORMAT,
            "tasks": self.tasks,
            "metric": self.metric,
            "method": self.method,
            "higher_is_better": self.higher_is_better,
            "references": {name: row.tolist() for name, row in self.references.items()},
            "timings": dict(self.timings),
            "versions": dict(self.versions),
            "diagnostics": {task: dict(facts) for task, facts in self.diagnostics.items()},
        }
        return json.dumps(facts)

    @cached_property
    def _summary(self) -> dict[str, Any]:
        return summarize(self)

    def _equal(self) -> Tensor | None:
        return self.raw[self.kinds.index("equal")] if "equal" in self.kinds else None

    def _diagonal(self, kind: str) -> Tensor | None:
        """Each task's metric under its own preference of a kind; None unless all are there."""
        own: dict[str | None, int] = {}
        for row, (found, task) in enumerate(zip(self.kinds, self.favoured, strict=True)):
            if found == kind:
                own.setdefault(task, row)  # of several, the one that stands first
        if not all(task in own for task in self.tasks):
            return None
        return torch.stack([self.raw[own[task], i] for i, task in enumerate(self.tasks)])

    def _check(self) -> None:
        count, tasks = len(self.kinds), len(self.tasks)
        if not tasks or len(set(self.tasks)) != tasks:
            raise ValueError(f"a sweep needs different tasks, found {list(self.tasks)}.")
        for name, tensor in (("preferences", self.preferences), ("raw", self.raw)):
            check_values(name, tensor)
            _expect_shape(name, tensor, (count, tasks))
        missing = [name for name in REFERENCES[:3] if name not in self.references]
        unknown = [name for name in self.references if name not in REFERENCES]
        if missing or unknown:
            raise ValueError(
                f"references must hold {', '.join(REFERENCES[:3])} and may hold per_task; missing "
                f"{missing}, unknown {unknown}."
            )
        for name, row in self.references.items():
            _expect_shape(f"references['{name}']", row, (tasks,))
            check_values(f"references['{name}']", row.unsqueeze(0))
        bad = sorted(set(self.kinds) - set(KINDS))
        if bad:
            raise ValueError(f"kinds {bad} are unknown, expected some of {list(KINDS)}.")
        strangers = sorted({str(t) for t in self.favoured if t is not None} - set(self.tasks))
        if strangers or len(self.favoured) != count:
            raise ValueError(
                f"favoured must name a task or None for each of {count} preferences; found "
                f"{len(self.favoured)}, unknown tasks {strangers}."
            )


def _expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, found {tuple(tensor.shape)}.")
