import pytest
import torch

from lightning_merge.functional.two_task_front import two_task_front


@pytest.mark.parametrize("rank", [2, 9])
def test_equals_solving_each_mixture(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B = normal(5, 9), normal(5, rank)
    Ca, Cb = A @ A.T, B @ B.T
    Na, Nb, H = normal(3, 5), normal(3, 5), normal(2, 3)
    front = two_task_front(Ca, Na, Cb, Nb)
    a = torch.tensor([1.0, 0.7, 0.01], dtype=torch.float64)
    b = torch.tensor([0.0, 0.3, 2.0], dtype=torch.float64)
    for x, y, W, HW in zip(a, b, front.maps(a, b), front.read_by(H).maps(a, b), strict=True):
        expected = (x * Na + y * Nb) @ torch.linalg.inv(x * Ca + y * Cb)
        assert torch.allclose(W, expected, rtol=1e-8, atol=1e-8)
        assert torch.allclose(HW, H @ expected, rtol=1e-8, atol=1e-8)


def test_first_task_must_be_definite() -> None:
    zero = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="not positive definite"):
        two_task_front(zero, zero, zero, zero)
