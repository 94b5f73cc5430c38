"""Which layers of a network are least-squares problems, and where their weights are."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from lightning_merge.networks import named_state
from lightning_merge.states import StateDict

Kind: TypeAlias = Literal["linear", "convolution", "attention", "norm", "embedding"]
Part: TypeAlias = Literal["", "q", "k", "v", "out"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SHARED = "Its weight is shared by layers that multiply it with different inputs:"
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _BatchNorm)


@dataclass(frozen=True)
class Site:
    """One layer, or one projection of a packed attention: a weight that meets its inputs."""

    name: str
    kind: Kind
    modules: tuple[str, ...]
    """Modules that use the weight; several if it is tied."""
    weights: tuple[str, ...]
    """Names of the weight in the state dict; several if it is tied."""
    biases: tuple[str, ...] = ()
    part: Part = ""
    rows: tuple[int, int] | None = None
    """Rows of the weight that belong to the site; None is all."""
    groups: int = 1

    def matrix(self, state: StateDict, *, bias: bool) -> Tensor:
        """The weight as g problems side by side, (g, o, i), float64; the bias as last column.

        A norm is g channels of one scale (and shift); an embedding g rows of o numbers.
        """
        weight = self._own(state[self.weights[0]].detach().double())
        columns = [self._grouped(weight)]
        if bias and self.biases:
            offset = self._own(state[self.biases[0]].detach().double())
            columns.append(offset.reshape(*columns[0].shape[:2], 1))
        return torch.cat(columns, -1)

    def write(self, state: dict[str, Tensor], matrix: Tensor, *, bias: bool) -> None:
        """Put a matrix into a state dict, in place, under all names of the weight."""
        split = bias and bool(self.biases)
        weight = matrix[..., :-1] if split else matrix
        for name in self.weights:
            self._own(state[name]).copy_(weight.reshape(self._own(state[name]).shape))
        if split:
            for name in self.biases:
                target = self._own(state[name])
                target.copy_(matrix[..., -1].reshape(target.shape))

    def _own(self, value: Tensor) -> Tensor:
        return value if self.rows is None else value[self.rows[0] : self.rows[1]]

    def _grouped(self, weight: Tensor) -> Tensor:
        if self.kind == "norm":
            return weight[:, None, None]
        if self.kind == "embedding":
            return weight[:, :, None]
        return weight.reshape(self.groups, len(weight) // self.groups, -1)


@dataclass(frozen=True)
class Sites:
    """What was found in a network."""

    handled: tuple[Site, ...]
    left: Mapping[str, str]
    """Why other modules with weights are left to the fallback, by name."""
    unknown: tuple[str, ...] = ()
    """Those of them that are worth a warning: modules with a matrix of weights that no kind of
    layer covers, and norms that are no plain norms."""

    def without(self, reasons: Mapping[str, str]) -> "Sites":
        """The same with some of the handled left to the fallback, for reasons worth a warning."""
        return Sites(
            handled=tuple(site for site in self.handled if site.name not in reasons),
            left={**self.left, **reasons},
            unknown=(*self.unknown, *reasons),
        )

    def told(self, fallback: str) -> str:
        """Names and reasons of what is unknown, in a sentence for each reason.

        Args:
            fallback: Name of the method that merges it.
        """
        reasons: dict[str, list[str]] = {}
        for name in self.unknown:
            reasons.setdefault(self.left[name], []).append(name)
        return " ".join(
            f"{len(names)} layers are merged by {fallback}, without a look at their inputs: "
            f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''}. {reason}."
            for reason, names in reasons.items()
        )


def find_sites(network: nn.Module, head: str, names: Sequence[str], kinds: Sequence[Kind]) -> Sites:
    """All layers outside the head whose weights are least-squares problems of their inputs.

    Args:
        network: The network, without wrappers.
        head: Dotted path of the head, which is left out.
        names: Names in the base's state dict.
        kinds: Kinds of layers to handle.

    Raises:
        ValueError: If a module cannot be hooked, or its weight is computed from others.
    """
    known = set(names)
    live = named_state(network)
    found: dict[tuple[object, ...], Site] = {}
    left: dict[str, str] = {}
    unknown: list[str] = []
    owners = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    ]
    for name, module in network.named_modules():
        if f"{name}.".startswith(f"{head}.") or any(name.startswith(f"{o}.") for o in owners):
            continue
        _check_plain(name, module)
        sites = _sites_of(name, module)
        if not sites and any(True for _ in module.parameters(recurse=False)):
            left[name] = _why(module)
            unknown += [name] if _has_matrix(module) else []
        for site in sites:
            if site.kind not in kinds:
                left[site.name] = f"{site.kind} layers are not asked for"
                continue
            _add(found, left, _with_ties(site, live, known))
    unknown += [name for name, reason in left.items() if reason.startswith(SHARED)]
    return Sites(handled=tuple(found.values()), left=left, unknown=tuple(unknown))


def may_be_site(name: str, shape: tuple[int, ...], kinds: Collection[Kind], *, bias: bool) -> bool:
    """Whether a parameter can belong to a layer that is solved, as far as name and shape tell.

    Args:
        name: Its name in the state dict.
        shape: Its shape.
        kinds: Kinds of layers that are solved.
        bias: Whether biases are solved with their weights.
    """
    leaf = name.rpartition(".")[2]
    if leaf in ("bias", "in_proj_bias"):
        return bias and bool(kinds)
    if leaf != "weight":
        packed = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return leaf in packed and "attention" in kinds
    of_rank: dict[int, set[Kind]] = {1: {"norm"}, 2: {"linear", "attention", "embedding"}}
    return not of_rank.get(len(shape), {"convolution"}).isdisjoint(kinds)


def _has_matrix(module: nn.Module) -> bool:
    # Tokens, tables of positions and scales of layers are parameters too, but of no layer.
    return any(
        "weight" in name and value.ndim > 1 and value.is_floating_point()
        for name, value in module.named_parameters(recurse=False)
    )


def _add(found: dict[tuple[object, ...], Site], left: dict[str, str], site: Site) -> None:
    if not site.weights:
        left[site.name] = "its weight is not in the base's state dict"
        return
    key = (site.weights, site.rows)
    twin = found.get(key)
    if twin is None:
        found[key] = site
    elif (twin.kind, twin.groups, twin.part) == (site.kind, site.groups, site.part):
        found[key] = Site(
            name=twin.name,
            kind=twin.kind,
            modules=(*twin.modules, *site.modules),
            weights=twin.weights,
            biases=tuple(dict.fromkeys((*twin.biases, *site.biases))),
            part=twin.part,
            rows=twin.rows,
            groups=twin.groups,
        )
    else:
        del found[key]
        left[site.name] = left[twin.name] = f"{SHARED} {twin.name} and {site.name}"


def _with_ties(site: Site, live: Mapping[str, Tensor], known: set[str]) -> Site:
    def names(first: str) -> tuple[str, ...]:
        value = live[first]
        same = [
            name
            for name, other in live.items()
            if name in known
            and other.data_ptr() == value.data_ptr()
            and other.shape == value.shape
            and other.numel()
        ]
        return tuple(same)

    return Site(
        name=site.name,
        kind=site.kind,
        modules=site.modules,
        weights=names(site.weights[0]),
        biases=names(site.biases[0]) if site.biases else (),
        part=site.part,
        rows=site.rows,
        groups=site.groups,
    )


def _sites_of(name: str, module: nn.Module) -> list[Site]:
    def one(kind: Kind, groups: int = 1) -> list[Site]:
        has_bias = getattr(module, "bias", None) is not None
        return [
            Site(
                name=name,
                kind=kind,
                modules=(name,),
                weights=(f"{name}.weight",),
                biases=(f"{name}.bias",) if has_bias else (),
                groups=groups,
            )
        ]

    if isinstance(module, nn.MultiheadAttention):
        return _attention_sites(name, module)
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return one("linear")
    if isinstance(module, CONVOLUTIONS) and _plain_convolution(module):
        return one("convolution", module.groups)
    if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
        return one("embedding") if module.max_norm is None else []
    if isinstance(module, NORMS) and module.weight is not None and module.weight.ndim == 1:
        return one("norm")
    return []


def _plain_convolution(module: _ConvNd) -> bool:
    plain = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    return type(module).forward in plain


def _attention_sites(name: str, module: nn.MultiheadAttention) -> list[Site]:
    width = module.embed_dim
    has_bias = module.in_proj_bias is not None
    parts: tuple[Part, ...] = ("q", "k", "v")
    sites = []
    for index, part in enumerate(parts):
        packed = module.in_proj_weight is not None
        rows = (index * width, (index + 1) * width)
        # Unpacked weights still share one packed bias, whose rows differ from theirs: averaged.
        sites.append(
            Site(
                name=f"{name}.{part}",
                kind="attention",
                modules=(name,),
                weights=(f"{name}.in_proj_weight" if packed else f"{name}.{part}_proj_weight",),
                biases=(f"{name}.in_proj_bias",) if has_bias and packed else (),
                part=part,
                rows=rows if packed else None,
            )
        )
    out = f"{name}.out_proj"
    sites.append(
        Site(
            name=out,
            kind="attention",
            modules=(name,),
            weights=(f"{out}.weight",),
            biases=(f"{out}.bias",) if module.out_proj.bias is not None else (),
            part="out",
        )
    )
    return sites


def _check_plain(name: str, module: nn.Module) -> None:
    what = None
    if isinstance(module, torch.jit.ScriptModule):
        what = "scripted and takes no hooks; use the eager module"
    elif parametrize.is_parametrized(module) or hasattr(module, "weight_g"):
        what = (
            "under a parametrization (such as weight norm), so its weight is computed from others; "
            "remove it first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    elif hasattr(module, "lora_A"):
        what = "a LoRA layer; merge the adapter into the weight first"
    elif "quantized" in type(module).__module__:
        what = "quantised; dequantise it first"
    if what:
        raise ValueError(f"layer '{name}' ({type(module).__name__}) is {what}.")


def _why(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return f"{kind}: transposed convolutions are not supported"
    return f"{kind} is not a layer whose output is linear in its weights, or is not known as one"
