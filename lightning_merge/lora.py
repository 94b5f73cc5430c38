"""LoRA adapters in peft's safetensors layout, as experts."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lightning_merge.methods import Average, WeightMethod
from lightning_merge.states import (
    Described,
    LazyStateDict,
    StateDict,
    dtype_of,
    kind_of,
    shape_of,
)

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
UNREADABLE = ("use_dora", "megatron_config", "layer_replication")
"""Settings that make an adapter more than pairs of factors."""


def merge_adapters(
    base: StateDict,
    adapters: Mapping[str, str | Path],
    method: WeightMethod = Average(),  # noqa: B008 (frozen)
    *,
    prefix: str | None = None,
) -> dict[str, Tensor]:
    """Merge LoRA adapters into one state dict with the base's keys, shapes and dtypes.

    TSVMerge, IsoC, IsoCTS, TaskArithmetic and Average work on the factors: no task's dense update
    is formed, only the merged one. Other methods get one parameter of all experts at a time, dense.

    Args:
        base: The pre-trained weights.
        adapters: Folder (or safetensors file in it) of each task's adapter, as peft saves it.
        method: How to merge.
        prefix: As for :class:`LoRAExpert`.

    Raises:
        ValueError: If an adapter does not fit the base or cannot be read.
    """
    experts = {task: LoRAExpert(path, base, prefix) for task, path in adapters.items()}
    return method.merge(base, experts)


def is_adapter(path: str | Path) -> bool:
    """Whether a path is a peft adapter: a folder with its two files, or the weights in one."""
    path = Path(path)
    folder = path.parent if path.name == WEIGHTS else path
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


@final
class LoRAExpert(Described):
    """The base with one adapter merged in, as a lazily read expert: any method takes it.

    A parameter is formed when it is asked for, so nothing but the adapter is held. Methods that
    can work on factors ask for :meth:`factors` instead.

    Args:
        path: Folder with ``adapter_model.safetensors`` and ``adapter_config.json``, as peft saves
            them, or the former file.
        base: The pre-trained weights.
        prefix: What the base's names have in front of the adapter's module names; by default the
            one under which everything fits.
    """

    def __init__(self, path: str | Path, base: StateDict, prefix: str | None = None) -> None:
        folder = Path(path).parent if Path(path).name == WEIGHTS else Path(path)
        self._base = base
        self._adapter = LazyStateDict(folder / WEIGHTS)
        self._config = _read_config(folder / CONFIG)
        modules = [n.removesuffix(DOWN) for n in self._adapter if n.endswith(DOWN)]
        self._check(folder, modules)
        plain = {module: module.removeprefix(PREFIX) for module in modules}
        if prefix is None:
            prefix = _prefix([f"{name}.weight" for name in plain.values()], base)
        self._modules = {f"{prefix}{name}.weight": module for module, name in plain.items()}
        whole = {
            f"{prefix}{name.removeprefix(PREFIX)}": name
            for name in self._adapter
            if ".lora_" not in name
        }
        self._whole = {name: key for name, key in whole.items() if name in base}
        self._others = {name: key for name, key in whole.items() if name not in base}
        self._check_shapes(folder)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The update of a matrix as a product: ``(out, rank)``, scaled, and ``(rank, in)``.

        A kernel is the matrix ``(out, in * kh * kw)``; rank 0 is a parameter that the adapter
        leaves alone. None: no such form, since it is no matrix or was saved whole.
        """
        shape = shape_of(self._base, name)
        if len(shape) < 2 or name in self._whole or kind_of(self._base, name) != "floating":
            return None
        if name not in self._modules:
            return torch.zeros(shape[0], 0), torch.zeros(0, _columns(shape))
        module = self._modules[name]
        down, up = (_wide(self._adapter[module + part]).flatten(1) for part in (DOWN, UP))
        up = up * self._scaling(module, len(down))
        return (down.t(), up.t()) if self._config.get("fan_in_fan_out") else (up, down)

    def others(self) -> dict[str, Tensor]:
        """What the adapter saved whole and the base does not have, such as a head."""
        return {name: self._adapter[key] for name, key in self._others.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without forming it."""
        if name in self._whole:
            return self._adapter.shape(self._whole[name])
        return shape_of(self._base, name)

    def kind(self, name: str) -> str:
        """Kind of one tensor, as :func:`lightning_merge.states.kind_of` gives it."""
        return kind_of(self._base, name)

    def dtype(self, name: str) -> str:
        """Dtype of the base's tensor."""
        return dtype_of(self._base, name)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._whole:
            return self._adapter[self._whole[name]]
        value = self._base[name]
        if name not in self._modules:
            return value
        factors = self.factors(name)
        assert factors is not None
        # not cast back: rounding to a half-precision base would lose most of a small update
        dtype = torch.promote_types(value.dtype, factors[0].dtype)
        update = factors[0].to(value.device, dtype) @ factors[1].to(value.device, dtype)
        return value.detach().to(dtype) + update.view(value.shape)

    def __contains__(self, name: object) -> bool:
        return name in self._base  # Mapping's own would form the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def _scaling(self, module: str, rank: int) -> float:
        """Alpha over the rank, or over its root; both may be given by pattern of modules."""
        name = module.removeprefix(PREFIX)
        patterns: dict[str, float] = self._config.get("alpha_pattern") or {}
        own = (a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", name))
        alpha = float(next(own, self._config["lora_alpha"]))
        return alpha / (rank**0.5 if self._config.get("use_rslora") else rank)

    def _check(self, folder: Path, modules: list[str]) -> None:
        known = {module + part for module in modules for part in (DOWN, UP)}
        found = {name for name in self._adapter if ".lora_" in name}
        if foreign := sorted(known ^ found):
            raise ValueError(
                f"{folder}: not plain pairs of lora_A and lora_B: {foreign[:5]}. Merge the adapter "
                "into its model and use that."
            )
        if not modules:
            raise ValueError(f"{folder}: {WEIGHTS} holds no pair of lora_A and lora_B.")

    def _check_shapes(self, folder: Path) -> None:
        missing = [name for name in self._modules if name not in self._base]
        if missing:
            raise ValueError(
                f"{folder}: the adapter does not fit. Not in the base: {missing[:5]}. Give "
                "prefix=, what the base's names have in front of the adapter's."
            )
        wrong = []
        for name in self._modules:
            factors, shape = self.factors(name), shape_of(self._base, name)
            found = None if factors is None else (len(factors[0]), factors[1].shape[1])
            if found != (shape[0], _columns(shape)):
                wrong.append(f"'{name}' {found} vs {shape}")
        if wrong:
            raise ValueError(
                f"{folder}: the adapter does not fit, its shapes differ from the base's: "
                f"{', '.join(wrong[:5])}. Give the base that it was trained on."
            )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _columns(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape[1:]:
        count *= size
    return count


def _prefix(names: list[str], base: StateDict) -> str:
    """The shortest prefix under which most names are in the base."""
    ends = {found.removesuffix(names[0]) for found in base if found.endswith(names[0])} | {""}
    fitting = [prefix for prefix in ends if not prefix or prefix.endswith(".")]
    return min(fitting, key=lambda p: (-sum(p + name in base for name in names), len(p), p))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
        float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a readable adapter config ({error}).") from error
    if special := [key for key in UNREADABLE if config.get(key)]:
        raise ValueError(
            f"{path}: {', '.join(special)} cannot be read. Merge the adapter into its model first."
        )
    return config
