"""Models for the benchmarks: ViT-B/32 shapes, a base and experts near it, seeded."""

import torch
from torch import Tensor


def vit_shapes(blocks: int = 12, width: int = 768) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of a ViT-B/32 image encoder (87 M parameters with twelve blocks)."""
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (width, 3, 32, 32),
        "class_embedding": (width,),
        "positional_embedding": (50, width),
        "proj": (width, 512),
    }
    for i in range(blocks):
        shapes |= {
            f"blocks.{i}.attn.in_proj.weight": (3 * width, width),
            f"blocks.{i}.attn.in_proj.bias": (3 * width,),
            f"blocks.{i}.attn.out_proj.weight": (width, width),
            f"blocks.{i}.attn.out_proj.bias": (width,),
            f"blocks.{i}.mlp.fc.weight": (4 * width, width),
            f"blocks.{i}.mlp.fc.bias": (4 * width,),
            f"blocks.{i}.mlp.proj.weight": (width, 4 * width),
            f"blocks.{i}.mlp.proj.bias": (width,),
            f"blocks.{i}.norm1.weight": (width,),
            f"blocks.{i}.norm2.weight": (width,),
        }
    return shapes


def experts_near_base(
    num_experts: int = 8, blocks: int = 12, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A base of scale 0.03 and experts whose task vectors are about 0.02 of it, as fine-tuning."""
    generator = torch.Generator().manual_seed(seed)
    base = {n: 0.03 * torch.randn(s, generator=generator) for n, s in vit_shapes(blocks).items()}
    experts = {
        f"task{t}": {
            n: v + 6e-4 * torch.randn(v.shape, generator=generator) for n, v in base.items()
        }
        for t in range(num_experts)
    }
    return base, experts
