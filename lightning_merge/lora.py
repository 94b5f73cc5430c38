"""LoRA adapters in peft's safetensors layout, as experts."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from lightning_merge.states import LazyStateDict, StateDict

PREFIX = "base_model.model."


@final
class LoRAExpert(Mapping[str, Tensor]):
    """The base with one adapter merged in, as a lazily read expert: any method takes it.

    A parameter is formed when it is asked for, so nothing but the adapter is held. :meth:`factors`
    gives the update in factored form, for what works without the dense product.

    Args:
        folder: Holds ``adapter_model.safetensors`` and ``adapter_config.json``, as peft saves them.
        base: The pre-trained weights.
        prefix: What the base's names have in front of the adapter's module names.
    """

    def __init__(self, folder: str | Path, base: StateDict, prefix: str = "") -> None:
        folder = Path(folder)
        self._base = base
        self._adapter = LazyStateDict(folder / "adapter_model.safetensors")
        self._scaling = _scaling(folder / "adapter_config.json")
        self._modules = {
            f"{prefix}{name.removeprefix(PREFIX).removesuffix('.lora_A.weight')}.weight": name
            for name in self._adapter
            if name.endswith(".lora_A.weight")
        }
        known = {name for down in self._modules.values() for name in (down, _up_name(down))}
        self._check(folder, sorted(set(self._adapter) ^ known))

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """``B`` with the scaling, of shape ``(out, rank)``, and ``A``; None: not adapted."""
        if name not in self._modules:
            return None
        down = self._adapter[self._modules[name]].float()
        return self._adapter[_up_name(self._modules[name])].float() * self._scaling, down

    def __getitem__(self, name: str) -> Tensor:
        value = self._base[name]
        factors = self.factors(name)
        if factors is None:
            return value
        up, down = factors
        wide = torch.promote_types(value.dtype, torch.float32)
        # not cast back: rounding to a half-precision base would lose most of a small update
        return value.detach().to(wide) + (up @ down).to(value.device, wide)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def _check(self, folder: Path, foreign: list[str]) -> None:
        missing = [name for name in self._modules if name not in self._base]
        if foreign or missing:
            raise ValueError(
                f"{folder}: the adapter does not fit. Not in the base: {missing[:5]}; not plain "
                f"pairs of lora_A and lora_B: {foreign[:5]}. Give the prefix of the base's names, "
                "or merge the adapter into its model and use that."
            )


def _up_name(down: str) -> str:
    return down.removesuffix("lora_A.weight") + "lora_B.weight"


def _scaling(path: Path) -> float:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a readable adapter config ({error}).") from error
    special = [key for key in ("rank_pattern", "alpha_pattern", "use_dora") if config.get(key)]
    if special:
        raise ValueError(
            f"{path}: {', '.join(special)} cannot be read. Merge the adapter into its model first."
        )
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
