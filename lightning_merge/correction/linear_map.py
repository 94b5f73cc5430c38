"""The correction itself: an affine map of features."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LinearMap:
    r"""The map :math:`\hat z = W z + b` from merged to corrected features, or a batch of maps."""

    weight: Tensor
    """W, (k, d), or (P, k, d) for P preferences; float64."""
    bias: Tensor | None = None
    """b, (k,) or (P, k)."""

    def __call__(self, features: Tensor) -> Tensor:
        """Correct row-major features (n, d) to (n, k), or (P, n, k) for a batch of maps.

        The product runs in the dtype of the features, which the result keeps.
        """
        corrected = features @ self.weight.to(features).mT
        return corrected if self.bias is None else corrected + self.bias.to(features)[..., None, :]

    def __getitem__(self, index: int) -> "LinearMap":
        """One map of a batch."""
        if self.weight.ndim != 3:
            raise TypeError("this LinearMap is a single map: only a batch of maps is indexed.")
        return LinearMap(self.weight[index], None if self.bias is None else self.bias[index])

    def __len__(self) -> int:
        if self.weight.ndim != 3:
            raise TypeError("this LinearMap is a single map and has no length.")
        return len(self.weight)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        r"""Absorb the map into a linear head that reads it: :math:`(H W,\ c + H b)`.

        Args:
            weight: H, (K, k).
            bias: c, (K,); None is zero.

        Returns:
            Folded weight (K, d) and bias (K,), batched like the map, in float64: cast them once.
        """
        wide = weight.detach().to(self.weight)
        offset = wide.new_zeros(len(wide)) if bias is None else bias.detach().to(wide)
        if self.bias is not None:
            offset = offset + self.bias @ wide.T
        elif self.weight.ndim == 3:
            offset = offset.expand(len(self.weight), -1)
        return wide @ self.weight, offset
