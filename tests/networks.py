"""Small networks of the shapes that experts come in, with the dotted path of their head."""

import copy

import timm
import torch
from torch import nn


class MLP(nn.Module):
    """Backbone and head inside one ``nn.Sequential``; the head is ``net.9``."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(6, 8)]
        for _ in range(4):
            layers += [nn.GELU(), nn.Linear(8, 8)]
        self.net = nn.Sequential(*layers, nn.Linear(8, classes))

    def forward(self, x):
        return self.net(x)


class DeepHead(nn.Module):
    """The head is itself an ``nn.Sequential`` of two linear layers."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.classifier = nn.Sequential(
            nn.LayerNorm(8), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, classes)
        )

    def forward(self, x):
        return self.classifier(self.features(x))


class Tied(nn.Module):
    """Two backbone layers share one weight; one buffer holds integers."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("steps", torch.tensor(7))
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.relu(self.first(x)))))


class Scaled(nn.Module):
    """The network does something after its head: a mapping of halved scores."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return {"logits": self.head(torch.relu(self.body(x))) / 2}


def convnext(classes: int = 3) -> nn.Module:
    return timm.create_model(
        "convnext_atto",
        in_chans=1,
        num_classes=classes,
        depths=(1, 1, 1, 1),
        dims=(8, 8, 8, 12),
        patch_size=2,
        kernel_sizes=3,
    )


def vit(classes: int = 3) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        in_chans=1,
        num_classes=classes,
        embed_dim=12,
        depth=2,
        num_heads=2,
    )


def resnet(classes: int = 3) -> nn.Module:
    return timm.create_model(
        "resnet10t", in_chans=1, num_classes=classes, channels=(8, 8, 12, 12), stem_width=8
    )


IMAGE, VECTOR = (1, 8, 8), (6,)

KINDS = {
    "mlp": (MLP, "net.9", VECTOR),
    "deep_head": (DeepHead, "classifier", VECTOR),
    "tied": (Tied, "head", VECTOR),
    "mapping": (Scaled, "head", VECTOR),
    "convnext": (convnext, "head.fc", (1, 32, 32)),
    "vit": (vit, "head", IMAGE),
    "resnet": (resnet, "fc", (1, 32, 32)),
}


def make(kind: str, classes: int = 3) -> tuple[nn.Module, str, tuple[int, ...]]:
    """Network, head path and shape of one input."""
    factory, head, shape = KINDS[kind]
    return factory(classes).eval(), head, shape


def tuned(base: nn.Module, seed: int, amount: float = 0.3) -> nn.Module:
    """A copy whose floating-point parameters moved, by a fraction of their own size."""
    expert = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in expert.parameters():
            size = amount * value.float().square().mean().sqrt().clamp_min(0.02)
            value += (size * torch.randn(value.shape, generator=generator)).to(value)
        for name, value in expert.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                value += 0.05 * amount * torch.rand(value.shape, generator=generator)
    return expert
