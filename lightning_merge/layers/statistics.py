"""Sums over the input columns of a layer, by task and fold: float64, streamed and additive."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_merge.functional.projection import Quadratic
from lightning_merge.functional.sums import add_products, fold_of, mixed, symmetric
from lightning_merge.layers.sites import Site


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which samples and columns count, in which fold."""

    samples: int | None = None
    """At most as many inputs of each task, evenly spread; null: all."""
    num_folds: int | None = 5
    """Folds kept apart for cross-validation; null keeps one sum (memory is F times as large)."""
    tokens_per_sample: int | None = 64
    """At most as many columns (tokens, patches) of each sample, drawn by a hash of sample and
    position; they count for all of them."""
    seed: int = 0
    """Of the draw."""

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples={self.samples}: expected at least 1, or null for all.")
        if self.num_folds is not None and self.num_folds < 2:
            raise ValueError(f"num_folds={self.num_folds}: expected at least 2, or null for none.")
        if self.tokens_per_sample is not None and self.tokens_per_sample < 1:
            raise ValueError(f"tokens_per_sample={self.tokens_per_sample}: expected at least 1.")


@dataclass(frozen=True)
class Picked:
    """Columns that count: ``values[keep]`` of the flattened ``(n * L, ...)`` columns."""

    keep: Tensor
    folds: Tensor
    weights: Tensor


def pick(
    columns: Tensor, owned: bool, indices: Tensor, real: Tensor | None, sampling: Sampling
) -> Picked:
    """Choose among the columns of one call; the same for every network that sees the batch.

    Args:
        columns: ``(n, L, ...)``.
        owned: Whether the columns belong to samples.
        indices: Global index of each sample, int64 (n,).
        real: ``(n, L)``, false for padding; used where L fits.
        sampling: Options.
    """
    n, length = columns.shape[:2]
    device = columns.device
    indices = indices.to(device)
    counted = torch.ones(n, length, dtype=torch.bool, device=device)
    each = torch.ones(n, 1, dtype=torch.float64, device=device)
    if not owned:
        # Seen by every sample of the batch alike.
        each, indices = each * len(indices), indices[:1]
    elif real is not None and real.shape == (n, length):
        counted = real.to(device)
    limit = sampling.tokens_per_sample
    if limit is not None and length > limit:
        place = torch.arange(length, device=device)
        keys = mixed(mixed(indices[:, None] + (sampling.seed << 32)) + place)
        keys = torch.where(counted, keys, torch.iinfo(torch.int64).max)
        chosen = torch.zeros_like(counted).scatter_(1, keys.argsort(1)[:, :limit], True) & counted
        each = each * (counted.sum(1, keepdim=True) / chosen.sum(1, keepdim=True).clamp_min(1))
        counted = chosen
    folds = fold_of(indices, sampling.num_folds or 1)[:, None].expand(n, length)
    keep = counted.reshape(-1)
    return Picked(
        keep=keep,
        folds=folds.reshape(-1)[keep],
        weights=each.expand(n, length).reshape(-1)[keep],
    )


def real_tokens(batch: Any) -> Tensor | None:
    """Tokens that are no padding, ``(n, L)``, from a mask among a network's named inputs.

    ``attention_mask`` (or any name that ends so) is true for tokens; a ``padding_mask`` is true
    for padding.
    """
    if isinstance(batch, Mapping):
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.ndim == 2:
                if name.endswith("padding_mask"):
                    return ~value.bool()
                if name.endswith("attention_mask"):
                    return value.bool()
    return None


class LayerSums:
    """Sums of one layer and one task.

    Args:
        site: The layer.
        shape: ``(g, o, i)`` of its matrix, the bias included where it is merged.
        num_folds: Folds kept apart; None is one sum.
        targets: Whether residuals to reach come with the columns.
        residual_gram: Whether their second moments are kept too.
        device: Where the sums live; it must know float64.
        elements: Names of the matrices whose outputs stand in for the columns, see
            :class:`lightning_merge.layers.coordinates.Coordinates`; none: the inputs themselves.
    """

    def __init__(
        self,
        site: Site,
        shape: tuple[int, int, int],
        *,
        num_folds: int | None,
        targets: bool = False,
        residual_gram: bool = False,
        device: torch.device | str = "cpu",
        elements: tuple[str, ...] = (),
    ) -> None:
        self.site = site
        self.shape = shape
        self.elements = elements
        g, o, i = shape
        folds = num_folds or 1
        sizes: dict[str, tuple[int, ...]] = {"n": (folds,), "gram": (folds, g, i, i)}
        if targets:
            sizes |= {"cross": (folds, g, o, i), "energy": (folds,), "target_energy": (folds,)}
        if targets and residual_gram:
            sizes["residual_gram"] = (folds, g, o, o)
        # Sums made inside inference mode must still be writable outside it.
        with torch.inference_mode(False):
            self._states = {
                name: torch.zeros(size, dtype=torch.float64, device=device)
                for name, size in sizes.items()
            }

    @property
    def num_folds(self) -> int:
        """Folds kept; 1 means none."""
        return len(self._states["n"])

    @property
    def count(self) -> float:
        """Columns seen, those drawn counting for all."""
        return float(self._states["n"].sum())

    @property
    def has_targets(self) -> bool:
        """Whether residuals were summed."""
        return "cross" in self._states

    @property
    def target_energy(self) -> float:
        """Sum of squares of the targets, where they were given."""
        return float(self._states["target_energy"].sum())

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(
        self,
        columns: Tensor,
        picked: Picked,
        residuals: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> None:
        """Add columns ``(g, m, i)``, residuals and targets ``(g, m, o)`` of the picked columns."""
        states = self._states
        # Sorted once, each fold is a slice; a root of the weight on both sides of every product.
        order = picked.folds.argsort(stable=True)
        sizes = picked.folds.bincount(minlength=self.num_folds).tolist()
        roots = picked.weights[order].sqrt()
        x = _in_order(columns, order, roots)
        r = None if residuals is None else _in_order(residuals, order, roots)
        states["n"].index_add_(0, picked.folds, picked.weights)
        for fold, rows in _slices(sizes):
            cross = states["cross"][fold] if r is not None else None
            own = None if r is None else r[:, rows]
            add_products(states["gram"][fold], cross, x[:, rows], own, x[:, rows])
            if own is not None and "residual_gram" in states:
                add_products(states["residual_gram"][fold], None, own, None, own)
        if r is not None and targets is not None:
            states["energy"].index_add_(0, picked.folds[order], r.square().sum((0, 2)))
            squares = targets.square().sum((0, 2)) * picked.weights
            states["target_energy"].index_add_(0, picked.folds, squares)

    @torch.inference_mode(False)
    @torch.no_grad()
    def add_numbers(self, rows: Tensor, picked: Picked) -> None:
        """Add the row numbers (m,) that an embedding looked up."""
        flat = self._states["gram"].view(self.num_folds, -1)
        flat.index_put_((picked.folds, rows), picked.weights, accumulate=True)
        self._states["n"].index_add_(0, picked.folds, picked.weights)

    def all_reduced(self, reduce: Callable[[Tensor], Tensor]) -> "LayerSums":
        """The sums over all processes; each calls this for the same layers in the same order."""
        return self._with({name: reduce(value.clone()) for name, value in self._states.items()})

    def to(self, device: torch.device | str) -> "LayerSums":
        """The same sums on another device."""
        return self._with({name: value.to(device) for name, value in self._states.items()})

    def __add__(self, other: "LayerSums") -> "LayerSums":
        return self._with({n: value + other._states[n] for n, value in self._states.items()})

    def tensors(self) -> dict[str, Tensor]:
        """All sums by name, copied."""
        return {name: value.clone() for name, value in self._states.items()}

    def grams(self) -> list[Tensor]:
        """Second moments of the columns by fold, (g, i, i) each."""
        return [symmetric(gram) for gram in self._states["gram"]]

    def quadratics(self) -> list[Quadratic]:
        """The objective towards the given targets, by fold."""
        states = self._states
        residual = states.get("residual_gram")
        return [
            Quadratic(
                gram=symmetric(states["gram"][f]),
                cross=states["cross"][f],
                energy=float(states["energy"][f]),
                residual_gram=None if residual is None else symmetric(residual[f]),
            )
            for f in range(self.num_folds)
        ]

    def _with(self, states: Mapping[str, Tensor]) -> "LayerSums":
        copy = LayerSums.__new__(LayerSums)
        copy.site, copy.shape, copy.elements = self.site, self.shape, self.elements
        copy._states = dict(states)
        return copy


def _in_order(values: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Rows of (g, m, d) in another order, each times its factor; strided as (m, g, d)."""
    rows = values.transpose(0, 1).index_select(0, order)
    return rows.mul_(factors[:, None, None]).transpose(0, 1)


def _slices(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Consecutive slices of these sizes with their numbers; the empty ones left out."""
    start = 0
    for number, size in enumerate(sizes):
        if size:
            yield number, slice(start, start + size)
        start += size
