import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_merge.functional.slerp import slerp
from lightning_merge.methods import Slerp
from tests.methods.models import model_sets, models

POSITIONS = st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])


def reference(a, b, t):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    if norms == 0:
        return (1 - t) * a + t * b
    w = np.arccos(np.clip((a * b).sum() / norms, -1, 1))
    if w < 1e-4:  # the arccosine has no digits left; the difference to linear is below 1e-8
        return (1 - t) * a + t * b
    return (np.sin((1 - t) * w) * a + np.sin(t * w) * b) / np.sin(w)


@given(seed=st.integers(0, 99), size=st.integers(2, 20), t=POSITIONS)
def test_equation_ends_and_symmetry(seed, size, t):
    a, b = torch.randn(2, size, generator=torch.Generator().manual_seed(seed))
    if (a * b).sum() / (a.norm() * b.norm()) < -0.999:
        return
    np.testing.assert_allclose(slerp(a, b, t), reference(a, b, t), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slerp(a, b, t), slerp(b, a, 1 - t))
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    unit = slerp(a / a.norm(), b / b.norm(), t)
    torch.testing.assert_close(unit.norm(), torch.tensor(1.0))
    norm = slerp(a, b, t, keep_norm=True).norm()
    torch.testing.assert_close(norm, (1 - t) * a.norm() + t * b.norm())


@given(t=POSITIONS, scale=st.sampled_from([1e-7, 1e-4, 1.0, 1e4]))
def test_continuous_and_exact_at_every_small_angle(t, scale):
    """On the unit circle the answer is known: the point at angle t of the arc."""
    a = scale * torch.tensor([1.0, 0.0], dtype=torch.float64)
    previous = None
    for angle in np.concatenate([np.linspace(0.0, 0.07, 71), np.logspace(-16, -2, 40)]):
        b = scale * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        found = slerp(a, b, t) / scale
        expected = torch.tensor([math.cos(t * angle), math.sin(t * angle)], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        if previous is not None and abs(angle - previous[0]) < 2e-3:
            # along the arc no step is longer than that of the angle: nothing jumps
            assert (found - previous[1]).norm() <= abs(angle - previous[0]) + 1e-12
        previous = angle, found


@pytest.mark.parametrize("keep_norm", [False, True])
def test_the_old_switch_to_linear_leaves_no_jump(keep_norm):
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    values = []
    for cosine in (0.9995 - 1e-9, 0.9995 + 1e-9):
        b = torch.tensor([cosine, (1 - cosine**2) ** 0.5], dtype=torch.float64)
        values.append(slerp(a, b, 0.5, keep_norm=keep_norm))
    assert (values[0] - values[1]).abs().max() < 1e-7  # the arguments differ by 6e-8


def test_zero_and_opposite_tensors():
    zero, one = torch.zeros(3), torch.ones(3)
    assert torch.equal(slerp(zero, one, 0.25), torch.full((3,), 0.25))
    with pytest.warns(UserWarning, match="opposite directions"):
        assert torch.equal(slerp(one, -one, 0.5), zero)


@given(data=model_sets(min_experts=2, max_experts=2))
def test_identical_experts_are_returned(data):
    base, experts = data
    same = {"a": experts["task0"], "b": experts["task0"]}
    merged = Slerp().merge(base, same)
    assert all(torch.equal(merged[name], experts["task0"][name]) for name in base)


def test_position_by_pattern_and_task_vectors():
    base, experts = models(2, shapes={"a.w": (4, 3), "b.w": (4, 3)})
    merged = Slerp(positions={"b.*": 1.0}, position=0.0).merge(base, experts)
    assert torch.equal(merged["a.w"], experts["task0"]["a.w"])
    assert torch.equal(merged["b.w"], experts["task1"]["b.w"])
    merged = Slerp(of="task_vectors", position=0.3).merge(base, experts)
    first, second = (e["a.w"] - base["a.w"] for e in experts.values())
    expected = np.asarray(base["a.w"]) + reference(first, second, 0.3)
    np.testing.assert_allclose(merged["a.w"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_experts", [1, 3])
def test_two_experts_only(num_experts):
    base, experts = models(num_experts)
    with pytest.raises(ValueError, match=f"exactly two experts, found {num_experts}"):
        Slerp().merge(base, experts)


def test_position_errors():
    with pytest.raises(ValueError, match=r"position must lie in \[0.0, 1.0\], found 1.5"):
        Slerp(position=1.5)
    with pytest.raises(ValueError, match=r"position of 'a\*' must lie"):
        Slerp(positions={"a*": -0.1})
