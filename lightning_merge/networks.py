"""Any ``nn.Module`` plus the dotted path of its head: split, fill, and read the representation.

The *representation* is the input of the head's first ``nn.Linear``; the *backbone* is every
parameter and buffer outside the head. Nothing else is asked of a network.
"""

import copy
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge.states import StateDict, shape_of

WRAPPERS = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module")
"""Name parts that torch.compile, Fabric and FSDP put between a module and its parent."""


def clean_names(state: StateDict) -> dict[str, Tensor]:
    """Drop the name parts that wrappers add: ``_orig_mod`` anywhere, ``module`` at the front.

    A front ``module.`` is dropped only where every name has it, as DistributedDataParallel makes
    it: a user may have an attribute of that name.
    """
    cleaned = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): tensor
        for name, tensor in state.items()
    }
    while cleaned and all(name.startswith("module.") for name in cleaned):
        cleaned = {name.removeprefix("module."): tensor for name, tensor in cleaned.items()}
    return cleaned


def named_state(network: nn.Module) -> dict[str, Tensor]:
    """Live tensors of a network under clean names: writing to them changes the network."""
    return clean_names(network.state_dict())


def floating_buffers(network: nn.Module, among: Container[str]) -> list[str]:
    """Clean names of the floating-point buffers of a network that are ``among`` some names."""
    every = network.named_buffers(remove_duplicate=False)
    buffers = {name for name, value in every if value.is_floating_point()}
    names = zip(network.state_dict(), named_state(network), strict=True)
    return [clean for name, clean in names if name in buffers and clean in among]


def plain_copy(network: nn.Module, without: object = None) -> nn.Module:
    """Copy a network without the wrappers of torch.compile and DistributedDataParallel.

    Args:
        network: Any module; it is not changed.
        without: An object that is not copied but left out (``None`` in the copy), as the Trainer
            that a LightningModule refers to.
    """
    memo: dict[int, Any] = {} if without is None else {id(without): None}
    return _without_wrappers(copy.deepcopy(_inner(network), memo))


def get_submodule(network: nn.Module, path: str) -> nn.Module:
    """Find the submodule at a dotted path, through wrappers.

    Raises:
        ValueError: If there is none; the message lists the names at the last level that exists.
    """
    module = _inner(network)
    for depth, part in enumerate(path.split(".") if path else []):
        child = module._modules.get(part)
        if child is None:
            level = ".".join(path.split(".")[:depth]) or type(module).__name__
            names = ", ".join(f"'{name}'" for name in module._modules) or "no submodules"
            raise ValueError(
                f"unknown path '{path}': {level} has no submodule '{part}', only {names}."
                f"{_head_candidates(network)}"
            )
        module = _inner(child)
    return module


def name_within(network: nn.Module, part: nn.Module) -> str:
    """Prefix of a part's names in the network's state, wrappers apart: empty, or with a dot.

    Raises:
        ValueError: If the part is not in the network.
    """
    for name, module in network.named_modules():
        if module is part:
            clean = ".".join(piece for piece in name.split(".") if piece not in WRAPPERS)
            return f"{clean}." if clean else ""
    raise ValueError(f"{type(part).__name__} is no part of {type(network).__name__}.")


def set_submodule(network: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path of a network."""
    parent, _, name = path.rpartition(".")
    get_submodule(network, parent)._modules[name] = module


def first_linear(head: nn.Module, path: str) -> tuple[str, nn.Linear]:
    """Name (within the head) and module of the head's first linear layer.

    Raises:
        ValueError: If the head has none.
    """
    for name, module in head.named_modules():
        if isinstance(module, nn.Linear):
            return name, module
    raise ValueError(
        f"the head '{path}' ({type(head).__name__}) has no nn.Linear, but the correction is folded "
        "into its first linear layer. Give the path of a head with one, or of the linear layer."
    )


def split_state(network: nn.Module, head: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a network's state into backbone and head: clean names, live tensors.

    Names of the backbone are those of the network; names of the head are relative to the head.

    Raises:
        ValueError: If the path is unknown or nothing but the head would be left.
    """
    get_submodule(network, head)
    prefix = f"{head}."
    backbone, own = {}, {}
    for name, tensor in named_state(network).items():
        if name.startswith(prefix):
            own[name.removeprefix(prefix)] = tensor
        else:
            backbone[name] = tensor
    if not head or not backbone:
        raise ValueError(
            f"the head '{head}' is the whole network: no backbone is left to merge. Give the path "
            f"of its last part.{_head_candidates(network)}"
        )
    return backbone, own


@torch.no_grad()
def load_backbone(network: nn.Module, state: StateDict, head: str) -> None:
    """Copy backbone weights into a network, in place; its head stays.

    Names that share one tensor in the network need to be in ``state`` once.

    Raises:
        ValueError: If names or shapes differ; all differences are listed and nothing is copied.
    """
    live, _ = split_state(network, head)
    given = {value.data_ptr() for name, value in live.items() if name in state}
    unknown = [f"'{name}' is not in the network" for name in state if name not in live]
    missing = [
        f"'{name}' is missing"
        for name, value in live.items()
        if name not in state and value.numel() and value.data_ptr() not in given
    ]
    shapes = [
        f"'{name}' {shape_of(state, name)} vs {tuple(value.shape)}"
        for name, value in live.items()
        if name in state and shape_of(state, name) != tuple(value.shape)
    ]
    if problems := unknown + shapes + missing:
        shown = ", ".join(problems[:5]) + (f", … ({len(problems)} in all)" * (len(problems) > 5))
        raise ValueError(
            f"these weights do not fit {type(_inner(network)).__name__}: {shown}. Build the "
            "network with the arguments it was trained with."
        )
    for name, target in live.items():
        if name in state:
            target.copy_(state[name])


def build_head(template: nn.Module, state: StateDict) -> nn.Module:
    """Build a head of a template's kind that holds ``state``, whatever its number of outputs.

    A template without parameters of its own (``nn.Identity``, as timm makes for no classes)
    becomes an ``nn.Linear`` when the state is that of one.

    Raises:
        ValueError: If the state's names are not the template's.
    """
    if not template.state_dict() and set(state) <= {"weight", "bias"} and "weight" in state:
        template = nn.Linear(1, 1)
    head = copy.deepcopy(template)
    names = set(head.state_dict())
    optional = {name for name in names ^ set(state) if name.rpartition(".")[2] == "bias"}
    if strangers := sorted((names ^ set(state)) - optional):
        raise ValueError(
            f"the head's parameters differ from those of {type(template).__name__}: {strangers}. "
            "Build the network with the head it was trained with."
        )
    for name in names | set(state):
        parent, _, leaf = name.rpartition(".")
        owner = head.get_submodule(parent)
        value = state[name].detach().clone() if name in state else None
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            # A new parameter: one tied to the backbone must not carry the head's values there.
            setattr(owner, leaf, None if value is None else nn.Parameter(value))
        if isinstance(owner, nn.Linear) and leaf == "weight":
            owner.out_features, owner.in_features = owner.weight.shape
    return head


def call_network(network: nn.Module, inputs: Any) -> Any:
    """Run a network on one batch: a tensor, named tensors (keywords), or several (positions)."""
    if isinstance(inputs, Mapping):
        return network(**inputs)
    if isinstance(inputs, (tuple, list)):
        return network(*inputs)
    return network(inputs)


def logits_of(output: Any) -> Tensor:
    """Class scores ``(n, K)`` of a network's output: a tensor, or the ``logits`` of a mapping.

    Raises:
        ValueError: If there are none.
    """
    found = output.get("logits") if isinstance(output, Mapping) else output
    if isinstance(found, Tensor) and found.ndim == 2:
        return found
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
    raise ValueError(
        f"class scores of shape (n, classes) are needed from the network, found {shape}."
    )


@contextmanager
def recording(head: nn.Module, path: str) -> Iterator[list[Tensor]]:
    """Record the representation while networks run with ``head``: rows of ``(n, d)``.

    Token grids ``(n, tokens, d)`` give one row a token. The list grows with every forward pass;
    clear it between batches.
    """
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach().flatten(0, -2))

    handle = first_linear(head, path)[1].register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def representation(network: nn.Module, head: str, inputs: Any) -> Tensor:
    """Representation of one batch, of shape ``(n, d)``: what enters the head's first linear layer.

    Raises:
        ValueError: If the forward pass never reaches that layer.
    """
    with recording(get_submodule(network, head), head) as seen:
        call_network(network, inputs)
    if not seen:
        raise ValueError(
            f"the forward pass of {type(network).__name__} never reaches the first linear layer of "
            f"its head '{head}'. Give the path of the head that the forward pass uses."
        )
    return torch.cat(seen)


def _inner(module: nn.Module) -> nn.Module:
    while True:
        if "_orig_mod" in module._modules:
            inner = module._modules["_orig_mod"]
        elif isinstance(module, nn.parallel.DistributedDataParallel):
            inner = module.module
        else:
            return module
        assert inner is not None
        module = inner


def _without_wrappers(module: nn.Module) -> nn.Module:
    module = _inner(module)
    # module.compile() keeps its graph here; hooks set after compilation would not run in it.
    module._compiled_call_impl = None
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _without_wrappers(child)
    return module


def _head_candidates(network: nn.Module) -> str:
    linear = [
        ".".join(part for part in name.split(".") if part not in WRAPPERS)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    if not linear:
        return " The network has no nn.Linear at all."
    return f" Linear layers, last first: {', '.join(reversed(linear[-5:]))}."
