"""Where a Vision Transformer looks: attention maps, and their overlay on the image.

Stands alone (torch, numpy, Pillow, matplotlib's colour maps), so that the Space ships this file.

- `mean`, `head`: the [CLS] row of a layer's attention over the patches, Dosovitskiy et al.
  2021, arXiv:2010.11929; the heads averaged, or one of them.
- `rollout`: Abnar & Zuidema 2020, arXiv:2005.00928. The layers' attentions multiplied, each
  averaged over heads and with the residual connection added.
- `relevance`: Chefer, Gur & Wolf 2021, arXiv:2103.15679. As rollout, but each head weighted
  by the gradient of one class's logit: what speaks for that class.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

METHODS = ("mean", "head", "rollout", "relevance")
COLORS = colormaps["viridis_r"]  # even steps, dark is much; reads in greyscale and colour-blind
LARGEST = 1024  # pixels of an overlay's longer side


@dataclass
class Maps:
    """The maps of a batch, from one forward pass. h and w count patches.

    logits (B, C); heads (B, L, H, h, w), the [CLS] row of each head of each layer; rollout
    (B, h, w); relevance (B, h, w) of `classes` (B,), or None where it was not asked for.
    """

    logits: Tensor
    heads: Tensor
    rollout: Tensor
    classes: Tensor
    relevance: Tensor | None

    def select(self, method: str, layer: int = -1, head: int = 0) -> Tensor:
        """The maps (B, h, w) of one method; layer and head count from 0, or back from -1.

        ValueError for an unknown method, layer or head.
        """
        layers, heads = self.heads.shape[1:3]
        if not -layers <= layer < layers:
            raise ValueError(
                f"There is no layer {layer}: the model has {layers}, 0 to {layers - 1}."
            )
        if not -heads <= head < heads:
            raise ValueError(f"There is no head {head}: a layer has {heads}, 0 to {heads - 1}.")
        if method == "mean":
            return self.heads[:, layer].mean(dim=1)
        if method == "head":
            return self.heads[:, layer, head]
        if method == "rollout":
            return self.rollout
        if method == "relevance" and self.relevance is not None:
            return self.relevance
        raise ValueError(f'There is no map "{method}"; choose from {", ".join(METHODS)}.')


def explain(
    model, pixels: Tensor, classes: Tensor | int | None = None, relevance: bool = True
) -> Maps:
    """All maps of a batch of pixels float (B, 3, S, S), on the model's device.

    `classes`, (B,) or one for all, are those relevance is for; default: the predicted ones.
    ValueError for a class the model doesn't know, or a model without global attention.
    """
    count = model.config.num_labels
    if isinstance(classes, int):
        classes = torch.full((len(pixels),), classes)
    if classes is not None and not ((classes >= 0) & (classes < count)).all():
        wrong = classes[(classes < 0) | (classes >= count)][0].item()
        raise ValueError(f"There is no class {wrong}: the model has {count}, 0 to {count - 1}.")
    with _eager(model), torch.set_grad_enabled(relevance):
        # The pixels ask for gradients, so that there are some in a frozen model too.
        pixels = pixels.detach().requires_grad_(relevance)
        output = model(pixels, output_attentions=True)
        attentions = getattr(output, "attentions", None) or ()  # L of (B, H, T, T)
        grid = _grid(model, pixels, attentions)
        if classes is None:
            classes = output.logits.argmax(dim=1)
        classes = classes.to(output.logits.device)
        if relevance:
            chosen = output.logits.gather(1, classes[:, None]).sum()
            gradients = torch.autograd.grad(chosen, attentions)
    attentions = [a.detach() for a in attentions]
    return Maps(
        logits=output.logits.detach(),
        heads=torch.stack([_class_row(a, grid) for a in attentions], dim=1),
        rollout=_class_row(rollout(attentions), grid),
        classes=classes,
        relevance=_class_row(relevances(attentions, gradients), grid) if relevance else None,
    )


def rollout(attentions: list[Tensor]) -> Tensor:
    """Attention rollout: L of (B, H, T, T) to (B, T, T), rows summing to 1."""
    size = attentions[0].shape[-1]
    identity = torch.eye(size, device=attentions[0].device)
    total = identity.expand(len(attentions[0]), -1, -1)
    for attention in attentions:
        mixed = (attention.mean(dim=1) + identity) / 2  # half through the residual connection
        total = mixed @ total  # (B, T, T)
    return total


def relevances(attentions: list[Tensor], gradients: tuple[Tensor, ...]) -> Tensor:
    """Class relevance from attentions and a logit's gradients, L of (B, H, T, T), to (B, T, T).

    R starts as the identity; each layer adds E_h[(gradient * attention)+] @ R.
    """
    size = attentions[0].shape[-1]
    total = torch.eye(size, device=attentions[0].device).expand(len(attentions[0]), -1, -1)
    for attention, gradient in zip(attentions, gradients, strict=True):
        # In float32, also for a model in bfloat16.
        total = total + (attention * gradient.float()).clamp(min=0).mean(dim=1) @ total
    return total


def overlay(image: Image.Image, values: np.ndarray, size: int = 224) -> Image.Image:
    """A map (h, w) laid over the image in grey, darker where it is higher: an RGB image.

    The map is resized smoothly to the image, and that as `fitted` does.
    """
    image = fitted(image, size).convert("L")
    smooth = Image.fromarray(normalized(values).astype(np.float32)).resize(
        image.size, Image.Resampling.BICUBIC
    )
    colors = COLORS(np.clip(np.asarray(smooth), 0, 1))[..., :3]  # (H, W, 3), 0 to 1
    # Multiplied, and the image lightened, so that the map is what makes it dark.
    light = 0.5 + 0.5 * np.asarray(image)[..., None] / 255
    return Image.fromarray((255 * colors * light).round().astype(np.uint8))


def fitted(image: Image.Image, size: int = 224) -> Image.Image:
    """In RGB, its longer side at least `size` pixels, to be read, and at most LARGEST."""
    longer = max(image.size)
    scale = min(max(longer, size), LARGEST) / longer
    sides = [max(1, round(side * scale)) for side in image.size]
    return image.convert("RGB").resize(sides, Image.Resampling.BICUBIC)


def normalized(values: np.ndarray) -> np.ndarray:
    """Stretched from 0, the least, to 1, the most; an even map is 0 throughout."""
    values = np.asarray(values, dtype=np.float64)
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else np.zeros_like(values)


@contextmanager
def _eager(model) -> Iterator[None]:
    """Only eager attention keeps its weights; what was set comes back afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _grid(model, pixels: Tensor, attentions) -> tuple[int, int]:
    """Patches down and across; ValueError where a token doesn't see every patch."""
    patch = getattr(model.config, "patch_size", None)
    if attentions and isinstance(patch, int):
        height, width = (side // patch for side in pixels.shape[-2:])
        shapes = {tuple(a.shape) for a in attentions}
        if len(shapes) == 1 and attentions[0].shape[-1] > height * width:
            return height, width
    raise ValueError(
        f"{type(model).__name__} has no global attention with a [CLS] token: there is no map "
        "to draw. ViT, DeiT and DINOv2 have."
    )


def _class_row(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """(..., T, T) to (..., h, w): [CLS] comes first, the patches last, other tokens between."""
    return attention[..., 0, -grid[0] * grid[1] :].unflatten(-1, grid)
