r"""What a linear head reads of a representation, and maps that serve several heads at once.

Minimised is :math:`\sum_t w_t \|S_t^{1/2} (W - W_t) C_t^{1/2}\|_F^2`, with :math:`W_t` the best map
of task t, :math:`C_t` its curvature and :math:`S_t = H_t^\top H_t + \rho I` for the head's
class-centred rows. As :math:`\rho \to \infty` this is the representation metric; as
:math:`\rho \to 0` only what heads read counts, and where they read different directions every head
gets what its own map would give it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_merge.functional.ridge import solve_right


def readout(weight: Float[Tensor, "c k"], *, centre: bool = True) -> Float[Tensor, "r k"]:
    r"""Rows that matter of a linear head, scaled so that :math:`\mathrm{tr}(H^\top H) = k`.

    Adding one vector to all rows of a classifier shifts all logits alike and changes no
    probability, so the mean row is taken out. At most k rows come back, with the same
    :math:`H^\top H`.

    Args:
        weight: Weight of the head, float64.
        centre: False for heads whose logits mean something each (regression, sigmoid). A head
            with one row is never centred.

    Raises:
        ValueError: If the head reads nothing.
    """
    rows = weight - weight.mean(0) if centre and len(weight) > 1 else weight
    if len(rows) > rows.shape[1]:
        rows = torch.linalg.qr(rows, mode="r")[1]
    energy = rows.square().sum()
    if not bool(energy > 0) or not bool(energy.isfinite()):
        raise ValueError(
            "the head's rows are all equal, zero or not finite: it reads nothing of the "
            "representation. Check that it was trained, or use metric='representation'."
        )
    return rows * (rows.shape[1] / energy).sqrt()


def row_space(
    rows: Float[Tensor, "r k"], tolerance: float = 1e-8
) -> tuple[Float[Tensor, "q k"], Float[Tensor, " q"]]:
    """Orthonormal basis of what a head reads, and its singular values, largest first."""
    _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    kept = tolerance * S[0] < S
    return Vh[kept], S[kept]


def independent(bases: Sequence[Tensor], conditioning: float = 1e-3) -> bool:
    """Whether heads read different directions: their stacked row spaces have full row rank.

    Args:
        bases: Orthonormal bases of the heads' row spaces, (q_t, k) each.
        conditioning: Least singular value of the stack that counts as full rank.
    """
    stack = torch.cat(list(bases))
    if len(stack) > stack.shape[1]:
        return False
    return bool(torch.linalg.svdvals(stack)[-1] > conditioning)


@dataclass(frozen=True)
class Decoupling:
    r"""The map that gives every head what its own map would, and is :math:`W_p` elsewhere.

    .. math:: W = W_p + V^{+} \left([V_t W_t]_t - V W_p\right)

    It is the limit of the metric as :math:`\rho \to 0`, and exact for independent heads.
    """

    basis: Tensor
    """V, the orthonormal bases of the heads' row spaces, stacked: (q, k), independent together."""
    inverse: Tensor
    r""":math:`V^{+}`, (k, q)."""
    wanted: Tensor
    """What the tasks' own maps give the heads, (q, d)."""

    @classmethod
    def of(cls, bases: Sequence[Tensor], own: Sequence[Tensor]) -> "Decoupling":
        """From the bases (q_t, k) and the maps of the tasks alone (k, d)."""
        V = torch.cat(list(bases))
        wanted = torch.cat([basis @ map_ for basis, map_ in zip(bases, own, strict=True)])
        return cls(V, solve_right(V.T, V @ V.T), wanted)

    def maps(self, shared: Float[Tensor, "*batch k d"]) -> Float[Tensor, "*batch k d"]:
        """The maps, given those of the representation metric."""
        return shared + self.inverse @ (self.wanted - self.basis @ shared)

    def split(self, rows: Float[Tensor, "r k"]) -> tuple[Tensor, Tensor]:
        r"""E (r, k) and F (r, d) of a read-out :math:`H W = E W_p + F`.

        Of a head that V holds, E is what moves all logits alike: its rows are equal.
        """
        read = rows @ self.inverse
        return rows - read @ self.basis, read @ self.wanted


@dataclass(frozen=True)
class HeadSystem:
    r"""Normal equations :math:`\sum_t w_t S_t W C_t = \sum_t w_t S_t N_t`, for P weightings."""

    rows: Sequence[Tensor]
    """Heads H_t, (r_t, k)."""
    curvatures: Tensor
    """C_t, (T, d, d)."""
    targets: Tensor
    """N_t, (T, k, d)."""
    floor: float
    r"""Weight of the representation metric, :math:`\rho > 0`."""

    def apply(self, weights: Float[Tensor, "p t"], maps: Float[Tensor, "p k d"]) -> Tensor:
        """Left-hand side, (P, k, d)."""
        mixed = (weights @ self.curvatures.flatten(1)).unflatten(1, self.curvatures.shape[1:])
        result = self.floor * maps @ mixed
        for w, H, C in zip(weights.T, self.rows, self.curvatures, strict=True):
            result = result + w[:, None, None] * (H.T @ ((H @ maps) @ C))
        return result

    def right(self, weights: Float[Tensor, "p t"]) -> Float[Tensor, "p k d"]:
        """Right-hand side."""
        read = torch.stack(
            [H.T @ (H @ N) + self.floor * N for H, N in zip(self.rows, self.targets, strict=True)]
        )
        return (weights @ read.flatten(1)).unflatten(1, read.shape[1:])

    def preconditioner(self, weights: Float[Tensor, "p t"]) -> Callable[[Tensor], Tensor]:
        r"""Inverse of the Kronecker average :math:`\bar S X \bar C` in the eigenbases of both."""
        traces = self.curvatures.diagonal(dim1=-2, dim2=-1).sum(-1)
        shares = weights * traces
        shares = shares / shares.sum(1, keepdim=True)
        grams = torch.stack([H.T @ H for H in self.rows])
        k = grams.shape[1]
        mean = (shares @ grams.flatten(1)).unflatten(1, (k, k))
        mean = mean + self.floor * torch.eye(k).to(mean)
        mixed = (weights @ self.curvatures.flatten(1)).unflatten(1, self.curvatures.shape[1:])
        s, U = torch.linalg.eigh(mean)
        c, Q = torch.linalg.eigh(mixed)
        # Rounding must not make the preconditioner indefinite.
        c = c.clamp_min(torch.finfo(c.dtype).eps * c[:, -1:])
        scale = s[:, :, None] * c[:, None, :]
        return lambda residual: U @ ((U.mT @ residual @ Q) / scale) @ Q.mT


def conjugate_gradients(
    system: HeadSystem,
    weights: Float[Tensor, "p t"],
    start: Float[Tensor, "p k d"],
    *,
    tolerance: float = 1e-9,
    max_steps: int = 1000,
) -> tuple[Float[Tensor, "p k d"], float]:
    r"""Solve the normal equations for P weightings at once.

    Args:
        system: The equations.
        weights: Non-negative, at least one positive a row.
        start: First guess, such as the maps of the representation metric.
        tolerance: Relative residual :math:`\|R - \mathcal{A}(W)\|_F / \|R\|_F` to reach.
        max_steps: Largest number of steps.

    Returns:
        The maps, and the largest true (recomputed) relative residual.

    Raises:
        ValueError: If the tolerance is not reached.
    """
    right = system.right(weights)
    size = right.flatten(1).norm(dim=1).clamp_min(torch.finfo(right.dtype).tiny)
    precondition = system.preconditioner(weights)
    X = start
    worst = torch.inf
    for _ in range(3):  # restarts from the true residual undo the drift of the recurrence
        residual = right - system.apply(weights, X)
        worst = float((residual.flatten(1).norm(dim=1) / size).max())
        if worst <= tolerance:
            return X, worst
        X = _descend(system, weights, X, residual, precondition, tolerance * size / 2, max_steps)
    residual = right - system.apply(weights, X)
    worst = float((residual.flatten(1).norm(dim=1) / size).max())
    if worst <= tolerance:
        return X, worst
    raise ValueError(
        f"the head metric was not solved in {3 * max_steps} steps: relative residual {worst:.1e}, "
        f"asked {tolerance:.1e}. Raise representation_weight or beta, or relax the tolerance."
    )


def _descend(
    system: HeadSystem,
    weights: Tensor,
    X: Tensor,
    residual: Tensor,
    precondition: Callable[[Tensor], Tensor],
    goal: Tensor,
    max_steps: int,
) -> Tensor:
    preconditioned = precondition(residual)
    direction = preconditioned
    rho = (residual * preconditioned).sum((1, 2))
    for _ in range(max_steps):
        running = residual.flatten(1).norm(dim=1) > goal
        if not bool(running.any()):
            break
        image = system.apply(weights, direction)
        curvature = (direction * image).sum((1, 2))
        # Solved rows stand still, so that a batch equals its rows one by one.
        step = torch.where(running & (curvature > 0), rho / curvature.clamp_min(1e-300), 0.0)
        X = X + step[:, None, None] * direction
        residual = residual - step[:, None, None] * image
        preconditioned = precondition(residual)
        new = (residual * preconditioned).sum((1, 2))
        momentum = torch.where(running, new / rho.clamp_min(1e-300), 0.0)
        direction = preconditioned + momentum[:, None, None] * direction
        rho = new
    return X
