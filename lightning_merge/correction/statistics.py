"""What the correction remembers of the calibration features: additive float64 sums."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_merge.correction.moments import Moments
from lightning_merge.correction.sums import STATES, check_removal, zeros
from lightning_merge.functional.sums import add_products, fold_of, symmetric

FeatureNorm = Literal["none", "l2"]


class CorrectionStatistics:
    r"""Sums over calibration samples that every correction is solved from; features are not kept.

    Sums are held per fold; a sample's fold is a hash of its global index, so neither batching nor
    the number of processes moves it. All states are additive: statistics of disjoint samples add
    to the statistics of their union, and subtract again.

    Args:
        dim_merged: Width d of the merged backbone's representation.
        dim_expert: Width k of the expert's representation.
        num_folds: Folds F kept for cross-validation, at least 2; memory grows with
            ``F (d^2 + k d)``. ``None`` keeps one pooled sum: no K-fold search later.
        feature_norm: ``"l2"`` scales every feature vector to unit length first (cosine heads).
        on_nonfinite: ``"skip"`` drops and counts rows with NaN or infinity; ``"error"`` raises.
        fingerprint: Names the merged backbone; statistics of another one don't add.
        device: Where the sums live; features are moved there. It must know float64.

    Raises:
        ValueError: If a width is below 1 or there are fewer than 2 folds.

    Example:
        >>> features = torch.eye(3)
        >>> statistics = CorrectionStatistics(3, 3)
        >>> statistics.update(features, 2 * features)
        >>> statistics.count, statistics.total().energy
        (3, 12.0)
    """

    def __init__(
        self,
        dim_merged: int,
        dim_expert: int,
        *,
        num_folds: int | None = 5,
        feature_norm: FeatureNorm = "none",
        on_nonfinite: Literal["error", "skip"] = "error",
        fingerprint: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        if min(dim_merged, dim_expert) < 1:
            raise ValueError(
                f"widths must be at least 1, got dim_merged={dim_merged}, dim_expert={dim_expert}."
            )
        if num_folds is not None and num_folds < 2:
            raise ValueError(f"num_folds={num_folds}: expected at least 2, or None for no folds.")
        if feature_norm not in ("none", "l2"):
            raise ValueError(f"feature_norm={feature_norm!r}: expected 'none' or 'l2'.")
        if on_nonfinite not in ("error", "skip"):
            raise ValueError(f"on_nonfinite={on_nonfinite!r}: expected 'error' or 'skip'.")
        self.feature_norm = feature_norm
        self.on_nonfinite = on_nonfinite
        self.fingerprint = fingerprint
        self._batches = 0
        # Statistics made inside inference mode must still be writable outside it.
        with torch.inference_mode(False):
            self._states = zeros(num_folds or 1, dim_merged, dim_expert, torch.device(device))

    @property
    def dim_merged(self) -> int:
        """Width d of the merged representation."""
        return self._states["cross"].shape[2]

    @property
    def dim_expert(self) -> int:
        """Width k of the expert representation."""
        return self._states["cross"].shape[1]

    @property
    def num_folds(self) -> int:
        """Folds kept; 1 means none."""
        return len(self._states["n"])

    @property
    def count(self) -> int:
        """Samples seen."""
        return int(self._states["count"].sum())

    @property
    def skipped(self) -> int:
        """Samples dropped for NaN or infinity."""
        return int(self._states["skipped"])

    @property
    def device(self) -> torch.device:
        """Where the sums live."""
        return self._states["gram"].device

    @property
    def metadata(self) -> dict[str, str]:
        """What statistics must agree on to be added, as strings for a file's header."""
        return {"feature_norm": self.feature_norm, "fingerprint": self.fingerprint}

    def __repr__(self) -> str:
        return (
            f"CorrectionStatistics({self.dim_merged}, {self.dim_expert}, "
            f"num_folds={self.num_folds}, count={self.count})"
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(
        self,
        merged_features: Tensor,
        expert_features: Tensor,
        indices: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Add one batch: features of both backbones on the *same* input tensors.

        Products and sums run in float64 outside autocast, whatever the dtype of the features.

        Args:
            merged_features: (n, d), floating point.
            expert_features: (n, k), floating point.
            indices: Global index of each sample in its calibration set, int64 (n,); decides the
                folds. By default a running count, which is right in one process only.
            weights: Weight of each sample, (n,), at least 0; by default 1. Give 0 to repeats that
                a sampler padded with.

        Raises:
            TypeError: If features are not real floating point.
            ValueError: If shapes differ from what was declared, or values are not finite.
        """
        batch = self._batches
        merged = self._checked("merged", merged_features, self.dim_merged)
        expert = self._checked("expert", expert_features, self.dim_expert)
        if len(merged) != len(expert):
            raise ValueError(
                f"batch {batch}: merged features {tuple(merged.shape)} and expert features "
                f"{tuple(expert.shape)} differ in rows; both must come from the same inputs."
            )
        rows = len(merged)
        if indices is None:
            start = self.count + self.skipped
            indices = torch.arange(start, start + rows, device=self.device)
        elif indices.shape != (rows,) or indices.dtype != torch.int64:
            raise ValueError(
                f"indices {tuple(indices.shape)} of {indices.dtype}; expected int64 ({rows},)."
            )
        omega = self._checked_weights(weights, rows)
        finite = merged.isfinite().all(1) & expert.isfinite().all(1)
        bad = rows - int(finite.sum())
        if bad and self.on_nonfinite == "error":
            raise ValueError(
                f"batch {batch}: {bad} of {rows} rows hold NaN or infinite features. Check the "
                "weights and the inputs, or pass on_nonfinite='skip' to drop and count such rows."
            )
        fold = fold_of(indices.to(self.device), self.num_folds)
        for f in range(self.num_folds):
            chosen = finite & (fold == f)
            if bool(chosen.any()):
                self._add(f, merged[chosen], expert[chosen], omega[chosen])
        self._states["skipped"] += bad
        self._batches += 1

    def _add(self, fold: int, merged: Tensor, expert: Tensor, omega: Tensor) -> None:
        if self.feature_norm == "l2":
            merged = torch.nn.functional.normalize(merged, dim=1)
            expert = torch.nn.functional.normalize(expert, dim=1)
        states = self._states
        with torch.autocast(merged.device.type, enabled=False):
            weighted = omega[:, None] * merged
            weighted_expert = omega[:, None] * expert
            add_products(states["gram"][fold], states["cross"][fold], merged, expert, weighted)
            states["expert_gram"].addmm_(expert.T, weighted_expert)
        states["energy"][fold] += (expert * weighted_expert).sum()
        states["sum_merged"][fold] += weighted.sum(0)
        states["sum_expert"][fold] += weighted_expert.sum(0)
        states["count"][fold] += len(merged)
        states["n"][fold] += omega.sum()
        states["n2"][fold] += omega.square().sum()

    def _checked(self, name: str, features: Tensor, width: int) -> Tensor:
        if not features.is_floating_point():
            raise TypeError(
                f"{name} features are {features.dtype}; expected real floating-point features."
            )
        if features.ndim != 2 or features.shape[1] != width:
            raise ValueError(
                f"{name} features have shape {tuple(features.shape)}; expected (n, {width}), one "
                "row a sample. Flatten token grids first."
            )
        # Moved first: some devices have no float64 to convert to.
        return features.detach().to(self.device).to(torch.float64)

    def _checked_weights(self, weights: Tensor | None, rows: int) -> Tensor:
        if weights is None:
            return torch.ones(rows, dtype=torch.float64, device=self.device)
        omega = weights.detach().to(self.device).to(torch.float64)
        if omega.shape != (rows,) or not bool((omega.isfinite() & (omega >= 0)).all()):
            raise ValueError(
                f"sample weights of shape {tuple(omega.shape)}; expected ({rows},), all finite and "
                "at least 0."
            )
        return omega

    def total(self) -> Moments:
        """Moments over all samples, G symmetrised."""
        states = self._states
        return Moments(
            count=self.count,
            n=float(states["n"].sum()),
            gram=symmetric(states["gram"].sum(0)),
            cross=states["cross"].sum(0),
            energy=float(states["energy"].sum()),
            sum_merged=states["sum_merged"].sum(0),
            sum_expert=states["sum_expert"].sum(0),
            expert_gram=symmetric(states["expert_gram"]),
        )

    def fold(self, number: int) -> Moments:
        """Moments of one fold, perhaps without samples."""
        states = self._states
        return Moments(
            count=int(states["count"][number]),
            n=float(states["n"][number]),
            gram=symmetric(states["gram"][number]),
            cross=states["cross"][number],
            energy=float(states["energy"][number]),
            sum_merged=states["sum_merged"][number],
            sum_expert=states["sum_expert"][number],
        )

    def folds(self) -> list[Moments]:
        """Moments of every fold that holds samples; one pooled fold if none were kept."""
        return [self.fold(f) for f in range(self.num_folds) if float(self._states["n"][f]) > 0]

    @property
    def effective_count(self) -> float:
        r"""Effective number of samples :math:`(\sum\omega)^2 / \sum\omega^2`."""
        n2 = float(self._states["n2"].sum())
        return float(self._states["n"].sum()) ** 2 / n2 if n2 > 0 else 0.0

    def tensors(self) -> dict[str, Tensor]:
        """All states by name, copied: float64 and int64, each additive over disjoint samples."""
        return {name: value.clone() for name, value in self._states.items()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> "CorrectionStatistics":
        """Statistics from :meth:`tensors` and :attr:`metadata`.

        Raises:
            ValueError: If states are missing, or their shapes or dtypes don't fit together.
        """
        missing = [name for name in STATES if name not in tensors]
        if missing:
            raise ValueError(
                f"correction statistics lack {missing}; found {sorted(tensors)}. The file is "
                "damaged or of another kind: calibrate again."
            )
        folds, k, d = (*tensors["cross"].shape, 0, 0, 0)[:3]
        metadata = metadata or {}
        norm = metadata.get("feature_norm", "none")
        statistics = cls(
            d,
            k,
            num_folds=folds if folds > 1 else None,
            feature_norm="l2" if norm == "l2" else "none",
            fingerprint=metadata.get("fingerprint", ""),
            device=tensors["cross"].device,
        )
        for name, state in statistics._states.items():
            found = tensors[name]
            if found.shape != state.shape or found.dtype != state.dtype:
                raise ValueError(
                    f"correction statistics: '{name}' is {tuple(found.shape)} of {found.dtype}, "
                    f"expected {tuple(state.shape)} of {state.dtype}. Calibrate again."
                )
        return statistics._with({name: tensors[name].clone() for name in STATES})

    def all_reduced(self, reduce: Callable[[Tensor], Tensor]) -> "CorrectionStatistics":
        """Statistics over all processes, exactly.

        Args:
            reduce: Sums one tensor over the processes and returns the sum; called once a state, in
                the same order everywhere.
        """
        return self._with({name: reduce(value.clone()) for name, value in self._states.items()})

    def to(self, device: torch.device | str) -> "CorrectionStatistics":
        """The same sums on another device."""
        return self._with({name: value.to(device) for name, value in self._states.items()})

    def __add__(self, other: "CorrectionStatistics") -> "CorrectionStatistics":
        self._check_same_kind(other)
        return self._with(
            {name: value + other._states[name] for name, value in self._states.items()}
        )

    def __sub__(self, other: "CorrectionStatistics") -> "CorrectionStatistics":
        """Take samples out that were once added.

        Raises:
            ValueError: If what is left could not be the statistics of any samples.
        """
        self._check_same_kind(other)
        left = {name: value - other._states[name] for name, value in self._states.items()}
        # What rounding leaves of an emptied fold is cleared, so that empty means exactly zero.
        empty = left["count"] == 0
        check_removal(left, self._states, empty)
        for name, value in left.items():
            if name not in ("skipped", "expert_gram"):
                value[empty] = 0
        if bool(empty.all()):
            left["expert_gram"].zero_()
        return self._with(left)

    def _with(self, states: Mapping[str, Tensor]) -> "CorrectionStatistics":
        copy = CorrectionStatistics(
            self.dim_merged,
            self.dim_expert,
            num_folds=self.num_folds if self.num_folds > 1 else None,
            feature_norm=self.feature_norm,
            on_nonfinite=self.on_nonfinite,
            fingerprint=self.fingerprint,
        )
        copy._states = dict(states)
        return copy

    def _check_same_kind(self, other: "CorrectionStatistics") -> None:
        mine, theirs = self._kind(), other._kind()
        differing = [
            f"{key} {mine[key]!r} vs {theirs[key]!r}" for key in mine if mine[key] != theirs[key]
        ]
        if differing:
            raise ValueError(
                f"correction statistics of different kinds: {'; '.join(differing)}. They must come "
                "from the same merged backbone with the same options."
            )

    def _kind(self) -> dict[str, object]:
        return {
            "widths": (self.dim_merged, self.dim_expert),
            "num_folds": self.num_folds,
            **self.metadata,
        }
