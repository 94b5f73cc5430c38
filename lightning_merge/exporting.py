"""Writing a network to a file that needs nothing of this package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_merge.files import replacing, replacing_folder, write_tensors
from lightning_merge.networks import named_state
from lightning_merge.states import tied_names

Format: TypeAlias = Literal["safetensors", "onnx", "torch_export", "timm"]


def write_network(
    network: nn.Module,
    path: Path,
    format: Literal["safetensors", "onnx", "torch_export"],  # noqa: A002
    example: Any,
    metadata: Mapping[str, str],
) -> Path:
    """Write a network's weights, or the whole program.

    Args:
        network: The network in evaluation mode.
        path: The file.
        format: ``safetensors`` for weights; ``onnx`` (extra ``onnx``) and ``torch_export`` for a
            program whose batch size is free.
        example: One batch of inputs for the programs, at least two samples.
        metadata: Header of a safetensors file.

    Raises:
        ValueError: If a program is asked for without an example, or the extra is missing.
    """
    if format == "safetensors":
        state = named_state(network)
        ties = tied_names(state)
        write_tensors(path, {k: v for k, v in state.items() if k not in ties}, metadata)
        return path
    if example is None:
        raise ValueError(
            f"format '{format}' traces the network: give example=, one batch of inputs."
        )
    args, dynamic = _arguments(example)
    with replacing(path) as temporary, torch.no_grad():
        program = torch.export.export(network.cpu(), *args, dynamic_shapes=dynamic)
        if format == "torch_export":
            torch.export.save(program, temporary)
            return path
        try:
            onnx = torch.onnx.export(program, dynamo=True, verbose=False)
        except (ImportError, ModuleNotFoundError) as error:
            raise ValueError(
                f"ONNX export needs the extra onnx ({error}): pip install 'lightning-merge[onnx]'."
            ) from error
        assert onnx is not None
        onnx.save(str(temporary), external_data=False)
    return path


def write_timm(network: nn.Module, path: Path, model: Mapping[str, Any] | None) -> Path:
    """Write a folder that ``timm.create_model("local-dir:PATH", pretrained=True)`` loads.

    It is also the layout of timm's models on the Hugging Face hub: ``config.json`` and
    ``model.safetensors``.

    Args:
        network: The tailored network of one task.
        path: The folder; an older one is replaced when the new one is whole.
        model: How the network was built: ``timm.create_model`` with its arguments.

    Raises:
        ValueError: If timm did not build it, or does not give it a head of this shape.
    """
    if model is None or model["class_path"] != "timm.create_model":
        built = "the caller's own code" if model is None else model["class_path"]
        raise ValueError(
            f"format 'timm' needs a network built by timm.create_model, and this one was built by "
            f"{built}: use format 'safetensors', and load it into a network of that class."
        )
    import timm

    state = named_state(network)
    arguments = dict(model.get("init_args") or {})
    name = arguments.pop("model_name")
    for other in ("pretrained", "checkpoint_path", "num_classes"):
        arguments.pop(other, None)
    classes = _outputs(network)
    rebuilt = timm.create_model(name, num_classes=classes, **arguments)
    names = {k: tuple(v.shape) for k, v in named_state(rebuilt).items()}
    if differing := {k for k in {*names, *state} if names.get(k) != _shape(state.get(k))}:
        raise ValueError(
            f"timm builds '{name}' with {classes} classes otherwise than this network: "
            f"{', '.join(sorted(differing)[:3])}. Use format 'safetensors'."
        )
    rebuilt.load_state_dict(state)
    with replacing_folder(path) as folder:
        timm.models.save_for_hf(rebuilt, str(folder), model_args=arguments, safe_serialization=True)
    return path


def _outputs(network: nn.Module) -> int:
    """Rows of the last linear layer."""
    return [m.out_features for m in network.modules() if isinstance(m, nn.Linear)][-1]


def _shape(value: Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)


def _arguments(example: Any) -> tuple[tuple[Any, ...], Any]:
    batch = torch.export.Dim("batch")
    if isinstance(example, Mapping):
        return ((), dict(example)), {name: {0: batch} for name in example}
    return ((example,),), ({0: batch},)
