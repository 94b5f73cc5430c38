"""Small models for the tests of the methods: a base and experts, as mappings of tensors."""

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

SHAPES = {
    "conv.weight": (4, 3, 3, 3),
    "fc.weight": (7, 5),
    "fc.bias": (7,),
    "logit_scale": (),
    "empty": (0, 5),
}


def random_state(seed: int, shapes=SHAPES, dtype=torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = sorted(shapes)
    return {n: torch.randn(shapes[n], generator=generator).to(dtype) for n in names}


def models(num_experts: int = 3, seed: int = 0, shapes=SHAPES, dtype=torch.float32, step=0.1):
    """A base and experts near it."""
    base = random_state(seed, shapes, dtype)
    experts = {}
    for t in range(num_experts):
        delta = random_state(seed + 1 + t, shapes)
        experts[f"task{t}"] = {n: (base[n] + step * delta[n]).to(dtype) for n in base}
    return base, experts


def flat(state) -> np.ndarray:
    """All values of a state dict in one float64 vector."""
    return np.concatenate([np.asarray(v.double()).ravel() for v in state.values()])


def flat_task_vectors(base, experts) -> np.ndarray:
    """Task vectors as the methods see them: the float32 difference, as float64 (T, N)."""
    rows = [
        np.concatenate([np.asarray(expert[n] - base[n]).ravel() for n in base])
        for expert in experts.values()
    ]
    return np.stack(rows).astype(np.float64)


@st.composite
def model_sets(draw, min_experts=1, max_experts=4, integers=False):
    """A base and experts of odd shapes; with ``integers`` the task vectors have many ties."""
    shapes = draw(
        st.dictionaries(
            st.sampled_from("abcdef"),
            st.lists(st.integers(0, 5), max_size=3).map(tuple),
            min_size=1,
            max_size=4,
        )
    )
    num_experts = draw(st.integers(min_experts, max_experts))
    seed = draw(st.integers(0, 10_000))
    base, experts = models(num_experts, seed, shapes)
    if integers:
        generator = torch.Generator().manual_seed(seed)
        base = {n: torch.zeros_like(v) for n, v in base.items()}
        experts = {
            t: {n: torch.randint(-3, 4, v.shape, generator=generator).float() for n, v in e.items()}
            for t, e in experts.items()
        }
    return base, experts
