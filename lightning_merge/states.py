"""State dicts of the core: mappings of tensors, read lazily from safetensors where large."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

StateDict: TypeAlias = Mapping[str, Tensor]

Layout: TypeAlias = dict[str, tuple[tuple[int, ...], str]]
"""Shape and kind of every tensor of a state dict."""

STATISTIC_SUFFIXES = ("running_mean", "running_var")
"""Last name part of floating buffers that are averaged, never extrapolated: variances stay >= 0."""

DTYPES = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BOOL": "bool",
}
"""What safetensors and torch call the same dtype."""


NARROW = (
    "Floating-point numbers of eight bits or fewer hold quantised weights, whose steps are larger "
    "than most task vectors, and often a scale beside them: convert base and experts to bfloat16 "
    "first, with their scales multiplied in."
)
"""The way out for what :func:`kind_of` calls ``float8``."""


class Described(Mapping[str, Tensor]):
    """A state dict that tells what its tensors are without reading them."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""

    @abstractmethod
    def kind(self, name: str) -> str:
        """Kind of one tensor."""

    @abstractmethod
    def dtype(self, name: str) -> str:
        """Dtype of one tensor."""


class LazyStateDict(Described):
    """A safetensors file as a mapping: one tensor is read when it is asked for, and not kept.

    Args:
        path: The file. A missing, truncated or foreign file is a ``ValueError`` that names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = safe_open(self.path, framework="pt", device="cpu")
            self._names = tuple(self._file.keys())
            self._known = frozenset(self._names)
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
        """A slice of one tensor along its first dimension, without reading the rest.

        It has memory of its own: where the mapped values begin depends on the length of the file's
        header, and some matrix products round by that, so equal inputs would give unequal features.
        """
        return self._file.get_slice(name)[rows].clone()

    def kind(self, name: str) -> str:
        """Kind of one tensor, as :func:`kind_of` gives it, from the header alone."""
        dtype = str(self._file.get_slice(name).get_dtype())
        if dtype.startswith("C"):
            return "complex"
        if dtype.startswith(("F8", "F6", "F4")):
            return "float8"
        return "floating" if dtype.startswith(("F", "BF")) else "integer"

    def dtype(self, name: str) -> str:
        """Dtype of one tensor in torch's words, such as ``float32``, from the header alone."""
        code = str(self._file.get_slice(name).get_dtype())
        return DTYPES.get(code, code)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            raise KeyError(name)
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path}: '{name}' cannot be read ({error}): the file changed after it was "
                "opened. Open it again, or repeat the step that made it."
            ) from error

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def shape_of(state: StateDict, name: str) -> tuple[int, ...]:
    """Shape of one tensor of a state dict, without reading its values where that is possible."""
    return state.shape(name) if isinstance(state, Described) else tuple(state[name].shape)


def dtype_of(state: StateDict, name: str) -> str:
    """Dtype of one tensor, such as ``float32``, without reading its values where possible."""
    if isinstance(state, Described):
        return state.dtype(name)
    return str(state[name].dtype).removeprefix("torch.")


def kind_of(state: StateDict, name: str) -> str:
    """What one tensor holds: ``"floating"``, ``"integer"`` (or boolean), or what can't be merged.

    The last are ``"complex"``, ``"sparse"``, ``"quantized"``, ``"float8"`` (or narrower) and
    ``"meta"`` (no values).
    """
    return state.kind(name) if isinstance(state, Described) else _kind(state[name])


def _kind(tensor: Tensor) -> str:
    if tensor.layout is not torch.strided:
        return "sparse"
    if tensor.is_meta:
        return "meta"
    if tensor.is_quantized:
        return "quantized"
    dtype = tensor.dtype
    if dtype.is_floating_point:
        return "float8" if dtype.itemsize == 1 else "floating"
    return "complex" if dtype.is_complex else "integer"


def tied_names(state: StateDict) -> dict[str, str]:
    """Names that share one tensor with an earlier name: ``{later name: first name}``.

    Only dictionaries have ties: what a mapping reads from files is new at every look.
    """
    if not isinstance(state, dict):
        return {}
    first: dict[tuple[object, ...], str] = {}
    ties: dict[str, str] = {}
    for name, tensor in state.items():
        if tensor.numel() == 0 or tensor.is_meta or tensor.layout is not torch.strided:
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if first.setdefault(key, name) != name:
            ties[name] = first[key]
    return ties


def check_compatible(base: StateDict, experts: Mapping[str, StateDict]) -> None:
    """Raise one ``ValueError`` listing every expert that does not fit the base, and why.

    Names, shapes, the kind of every tensor (floating or integer), and ties are compared; no value
    is read, apart from the tied ones.
    """
    if not experts:
        raise ValueError("no experts: a merge needs at least one expert.")
    expected = _layout(base)
    problems = [
        f"the base: {_listed(f'{kind}, which cannot be merged', names)}"
        for kind, names in _unmergeable(expected).items()
    ]
    ties = tied_names(base)
    layouts = {task: _layout(expert) for task, expert in experts.items()}
    for task, layout in layouts.items():
        found = {
            "missing": [name for name in expected if name not in layout],
            "not in the base": [name for name in layout if name not in expected],
            "of another shape than in the base": _differences(expected, layout, 0),
            "of another kind than in the base": _differences(expected, layout, 1),
            "different though the base ties them": _torn_ties(ties, experts[task]),
        }
        problems += [
            f"expert '{task}': {_listed(what, names)}" for what, names in found.items() if names
        ]
    if problems:
        raise ValueError(
            "; ".join(problems)
            + ". Experts must be fine-tuned from this base; merge the backbone only."
            + (f" {NARROW}" if _any_narrow([expected, *layouts.values()]) else "")
        )


def _layout(state: StateDict) -> Layout:
    if isinstance(state, Described):
        return {name: (state.shape(name), state.kind(name)) for name in state}
    return {name: (tuple(tensor.shape), _kind(tensor)) for name, tensor in state.items()}


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() == 1


def _any_narrow(layouts: Sequence[Layout]) -> bool:
    return any(kind == "float8" for layout in layouts for _, kind in layout.values())


def _unmergeable(layout: Layout) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name, (_, kind) in layout.items():
        if kind not in ("floating", "integer"):
            kinds.setdefault(kind, []).append(name)
    return kinds


def _differences(base: Layout, expert: Layout, trait: int) -> list[str]:
    both = [(name, expert[name][trait], base[name][trait]) for name in base if name in expert]
    return [
        f"'{name}' {found} vs {expected}" for name, found, expected in both if found != expected
    ]


def _torn_ties(ties: Mapping[str, str], expert: StateDict) -> list[str]:
    return [
        f"'{later}' and '{first}'"
        for later, first in ties.items()
        if later in expert and first in expert and not torch.equal(expert[later], expert[first])
    ]


def check_finite(name: str, owner: str, tensor: Tensor) -> None:
    """Raise a ``ValueError`` naming the tensor and its owner if it holds NaN or infinity.

    Or if it is of a float dtype so narrow that it cannot be computed with.
    """
    if _is_narrow(tensor):
        raise ValueError(f"{owner}: parameter '{name}' is of {tensor.dtype}. {NARROW}")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{owner}: parameter '{name}' holds {count} non-finite values of {tensor.numel()} "
            "(NaN or infinite). Its training diverged: fine-tune it again, or leave it out."
        )


def fingerprint(state: StateDict) -> str:
    """SHA-256 of the names, shapes, dtypes and values of a state dict, in sorted order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _listed(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (f", … ({len(names) - 5} more)" if len(names) > 5 else "")
    return f"{len(names)} parameters {what}: {shown}"
