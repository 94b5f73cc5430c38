"""The image tower of CLIP with a linear head: what the eight-task benchmark fine-tunes."""

from typing import Any, Literal, final

from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_merge.modules.networks import create_timm, timm_head
from lightning_merge.networks import get_submodule


@final
class ImageTower(nn.Module):
    """A timm image tower with its projection, and a linear head on the embedding.

    The backbone is the tower with its projection, ``(n, 3, H, W)`` to ``(n, dim)``; the
    representation is the embedding. CLIP scores by the cosine between an embedding and a text
    (Radford et al., 2021, arXiv:2103.00020), so the length of the embedding is divided out, in
    one of two places:

    * ``scores``: after the head. The representation that is corrected is the embedding as it is.
    * ``representation``: before the head. Every sample then counts equally in a correction.

    Both give the same scores where the head has no bias. A corrected head keeps the order of the
    scores exactly, and not their scale, as the length divided out is that of the uncorrected
    embedding.

    Args:
        model: Name of the timm model.
        pretrained: Load timm's weights; a string is their tag (needs the network once).
        dim: Width of the embedding: outputs of the projection, which is timm's classifier here.
        num_classes: Outputs of the head.
        unit_length: Where the length of the embedding is divided out, if anywhere.
        model_args: More arguments of ``timm.create_model``.
    """

    def __init__(
        self,
        model: str = "vit_base_patch32_clip_quickgelu_224",
        pretrained: bool | str = False,
        dim: int = 512,
        num_classes: int = 2,
        unit_length: Literal["scores", "representation", "none"] = "scores",
        model_args: dict | None = None,  # type: ignore[type-arg]  # a plain dict stays as it is
    ) -> None:
        super().__init__()
        self._arguments: dict[str, Any] = {
            "model": model,
            "dim": dim,
            "unit_length": unit_length,
            "model_args": dict(model_args or {}),
        }
        self.unit_length = unit_length
        self.tower = create_timm(model, dict(model_args or {}), pretrained, dim)
        projection: Any = get_submodule(self.tower, timm_head(self.tower))
        if getattr(projection, "bias", None) is not None:
            # CLIP's projection has none; timm's is zero, and stays so.
            nn.init.zeros_(projection.bias)
            projection.bias.requires_grad_(False)
        self.head = nn.Linear(dim, num_classes)

    @property
    def network_spec(self) -> dict[str, Any]:
        """Class path and arguments that rebuild the network without its weights."""
        kind = type(self)
        arguments = self._arguments | {"num_classes": self.head.out_features}
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the classes, ``(n, num_classes)``."""
        embedding = self.tower(images)
        if self.unit_length == "representation":
            embedding = normalize(embedding, dim=-1)
        scores = self.head(embedding)
        if self.unit_length == "scores":
            length = embedding.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            # A sweep puts a head here that answers for several preferences: copies of the batch.
            scores = scores / length.repeat(len(scores) // max(1, len(length)), 1)
        return scores
