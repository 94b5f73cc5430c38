"""State dicts of the core: mappings of tensors, read lazily from safetensors where large."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

StateDict: TypeAlias = Mapping[str, Tensor]

STATISTIC_SUFFIXES = ("running_mean", "running_var")
"""Last name part of floating buffers that are averaged, never extrapolated: variances stay >= 0."""


class LazyStateDict(Mapping[str, Tensor]):
    """A safetensors file as a mapping: one tensor is read when it is asked for, and not kept.

    Args:
        path: The file. A missing, truncated or foreign file is a ``ValueError`` that names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = safe_open(self.path, framework="pt", device="cpu")
            self._names = tuple(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path} is not a readable safetensors file ({error}): it may be truncated or "
                "of another kind. Write it again, or delete it and repeat the step that made it."
            ) from error

    @property
    def metadata(self) -> dict[str, str]:
        """The string pairs of the file's header."""
        return dict(self._file.metadata() or {})

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header alone."""
        return tuple(self._file.get_slice(name).get_shape())

    def rows(self, name: str, rows: slice) -> Tensor:
        """A slice of one tensor along its first dimension, without reading the rest."""
        return self._file.get_slice(name)[rows]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def shape_of(state: StateDict, name: str) -> tuple[int, ...]:
    """Shape of one tensor of a state dict, without reading its values where that is possible."""
    return state.shape(name) if isinstance(state, LazyStateDict) else tuple(state[name].shape)


def tied_names(state: StateDict) -> dict[str, str]:
    """Names that share one tensor with an earlier name: ``{later name: first name}``.

    Lazily read files hold every tensor once, so they have no ties.
    """
    if isinstance(state, LazyStateDict):
        return {}
    first: dict[tuple[object, ...], str] = {}
    ties: dict[str, str] = {}
    for name, tensor in state.items():
        if tensor.numel() == 0 or tensor.is_meta:
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if first.setdefault(key, name) != name:
            ties[name] = first[key]
    return ties


def check_compatible(base: StateDict, experts: Mapping[str, StateDict]) -> None:
    """Raise one ``ValueError`` listing all experts whose keys or shapes differ from the base's."""
    if not experts:
        raise ValueError("no experts: a merge needs at least one expert.")
    problems = []
    for task, expert in experts.items():
        missing = [name for name in base if name not in expert]
        extra = [name for name in expert if name not in base]
        shapes = [
            f"'{name}' {shape_of(expert, name)} vs {shape_of(base, name)}"
            for name in base
            if name in expert and shape_of(expert, name) != shape_of(base, name)
        ]
        if missing:
            problems.append(f"expert '{task}': {_listed('missing', missing)}")
        if extra:
            problems.append(f"expert '{task}': {_listed('not in the base', extra)}")
        if shapes:
            problems.append(
                f"expert '{task}': {_listed('of another shape than in the base', shapes)}"
            )
    if problems:
        raise ValueError(
            "; ".join(problems)
            + ". Experts must be fine-tuned from this base; merge the backbone only."
        )


def check_finite(name: str, owner: str, tensor: Tensor) -> None:
    """Raise a ``ValueError`` naming the tensor and its owner if it holds NaN or infinity."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{owner}: parameter '{name}' holds {count} non-finite values of {tensor.numel()} "
            "(NaN or infinite). Its training diverged: fine-tune it again, or leave it out."
        )


def _listed(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (f", … ({len(names) - 5} more)" if len(names) > 5 else "")
    return f"{len(names)} parameters {what}: {shown}"
