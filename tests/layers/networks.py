"""Small networks with every kind of layer, experts near a base, and their calibration."""

import copy

import torch
from torch import nn

from lightning_merge.calibration import CalibrationInputs
from lightning_merge.methods import Calibration
from lightning_merge.networks import plain_copy, split_state
from lightning_merge.runtime import Runtime


class Convolutions(nn.Module):
    """Strides, groups, dilation and a batch norm; the head is ``head``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.deep = nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.act(self.deep(self.act(self.norm(self.stem(x))))).mean((2, 3)))


class Tokens(nn.Module):
    """Embedding, packed attention with a padding mask, two blocks; the head is ``head``."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        layers = [nn.TransformerEncoderLayer(width, 2, 12, 0.0, batch_first=True) for _ in range(2)]
        self.blocks = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        padding = None if attention_mask is None else ~attention_mask.bool()
        for block in self.blocks:
            x = block(x, src_key_padding_mask=padding)
        return self.head(self.norm(x)[:, 0])


class Memory:
    """Keys of every block so far; grows while a network runs, as the caches of decoders do."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []


class DecoderBlock(nn.Module):
    """Attends to all keys in the memory, and adds its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x, memory=None):
        memory.keys.append(self.key(x))
        keys = torch.cat(memory.keys, 1)
        return x + self.out((self.query(x) @ keys.mT).softmax(-1) @ keys)


class Decoder(nn.Module):
    """Blocks that share a memory made anew in every pass; the head is ``head``.

    Args:
        memory: Makes the memory.
    """

    def __init__(self, memory=Memory, width: int = 4) -> None:
        super().__init__()
        self.memory = memory
        self.blocks = nn.ModuleList(DecoderBlock(width) for _ in range(3))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        memory = self.memory()
        for block in self.blocks:
            x = block(x, memory=memory)
        return self.head(x[:, -1])


def mlp(width: int = 5, inputs: int = 4) -> nn.Module:
    """Three linear layers with an activation between, the last being the head ``4``."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)
    )


def experts_of(network: nn.Module, tasks: int = 3, step: float = 0.2) -> dict[str, nn.Module]:
    """Experts whose parameters and running statistics are a step away from the network's."""
    experts = {}
    for t in range(tasks):
        generator = torch.Generator().manual_seed(100 + t)
        expert = copy.deepcopy(network).eval()
        with torch.no_grad():
            for name, value in expert.state_dict().items():
                if value.is_floating_point():
                    noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
                    value.add_(step * (noise.abs() if name.endswith("var") else noise))
        experts[f"task{t}"] = expert
    return experts


def calibration_of(experts, inputs, head: str, batch_size: int = 16, runtime=None) -> Calibration:
    return Calibration(
        network=lambda task: plain_copy(experts[task]).eval(),
        head=head,
        inputs={task: CalibrationInputs.collect(x) for task, x in inputs.items()},
        batch_size=batch_size,
        runtime=runtime or Runtime(),
    )


def case(network: nn.Module, head: str, shape, tasks: int = 3, samples: int = 40, step=0.2, **kw):
    """State dicts of base and experts, their calibration, and the expert networks."""
    experts = experts_of(network.eval(), tasks, step)
    generator = torch.Generator().manual_seed(7)
    inputs = {
        task: torch.randn(samples + 3 * t, *shape, generator=generator) + 0.3 * t
        for t, task in enumerate(experts)
    }
    states = {task: split_state(expert, head)[0] for task, expert in experts.items()}
    calibration = calibration_of(experts, inputs, head, **kw)
    return split_state(network, head)[0], states, calibration, experts


def token_case(tasks: int = 2, samples: int = 20):
    """As :func:`case`, with token numbers and an attention mask."""
    network = Tokens().eval()
    experts = experts_of(network, tasks)
    generator = torch.Generator().manual_seed(3)
    inputs = {}
    for task in experts:
        ids = torch.randint(0, 9, (samples, 7), generator=generator)  # two numbers never occur
        lengths = torch.randint(3, 8, (samples, 1), generator=generator)
        inputs[task] = {
            "input_ids": ids,
            "attention_mask": (torch.arange(7)[None] < lengths).long(),
        }
    states = {task: split_state(expert, "head")[0] for task, expert in experts.items()}
    calibration = calibration_of(experts, inputs, "head")
    return split_state(network, "head")[0], states, calibration, experts
