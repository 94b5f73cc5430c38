"""Writing a network to a file that needs nothing of this package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lightning_merge.files import replacing, write_tensors
from lightning_merge.networks import named_state
from lightning_merge.states import tied_names


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


def _arguments(example: Any) -> tuple[tuple[Any, ...], Any]:
    batch = torch.export.Dim("batch")
    if isinstance(example, Mapping):
        return ((), dict(example)), {name: {0: batch} for name in example}
    return ((example,),), ({0: batch},)
