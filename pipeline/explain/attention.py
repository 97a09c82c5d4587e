"""Attention maps of a Vision Transformer, and their overlay on the image.

The published Space ships this file, so it imports nothing of the project.
- `mean`, `head`: the [CLS] row of a layer's attention over the patches, averaged over the heads
  or of one head (Dosovitskiy et al. 2021, arXiv:2010.11929).
- `rollout`: the attention of all layers multiplied, each averaged over its heads and mixed with
  the identity for the residual connection (Abnar & Zuidema 2020, arXiv:2005.00928).
- `relevance`: as rollout, but each head is weighted by the gradient of one class's logit, so that
  the map shows the evidence for that class (Chefer, Gur & Wolf 2021, arXiv:2103.15679).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from PIL import Image
from torch import Tensor

METHODS = ("mean", "head", "rollout", "relevance")
# Pale to dark purple, in even steps of lightness: legible in grayscale and to color-blind people.
COLORMAP = ListedColormap(colormaps["magma_r"](np.linspace(0, 0.88, 256)), "attention")
VEIL = 0.35  # share of white mixed into the image, so that dark colors show on dark images
MAX_SIDE = 1024  # pixels of the longer side of an overlay
_NO_MAPS = (
    "{} has no global attention with a [CLS] token that it classifies by, so there is no map to "
    "draw. ViT, DeiT and DINOv2 have it."
)


@dataclass
class Maps:
    """The maps of a batch of B images over h x w patches, from one forward pass."""

    logits: Tensor  # (B, C)
    heads: Tensor  # (B, L, H, h, w), the [CLS] row of each head of each layer
    rollout: Tensor  # (B, h, w)
    classes: Tensor  # int64 (B,), the classes that relevance is for
    relevance: Tensor | None  # (B, h, w), None if it was not requested

    def select(self, method: str, layer: int = -1, head: int = 0) -> Tensor:
        """Return the maps (B, h, w) of one method; ValueError for an unknown method or index.

        Layers and heads count from 0, or back from -1.
        """
        layers, heads = self.heads.shape[1:3]
        if not -layers <= layer < layers:
            raise ValueError(f"There is no layer {layer}; the layers are 0 to {layers - 1}.")
        if not -heads <= head < heads:
            raise ValueError(f"There is no head {head}; the heads are 0 to {heads - 1}.")
        if method == "mean":
            return self.heads[:, layer].mean(dim=1)
        if method == "head":
            return self.heads[:, layer, head]
        if method == "rollout":
            return self.rollout
        if method == "relevance" and self.relevance is not None:
            return self.relevance
        raise ValueError(f'There is no map "{method}"; choose from {", ".join(METHODS)}.')


def compute_maps(
    model, pixels: Tensor, classes: Tensor | int | None = None, relevance: bool = True
) -> Maps:
    """Compute all maps of a batch in one forward pass, and one backward pass for relevance.

    Args:
        model: An image classifier of transformers with global attention, else ValueError. That it
            classifies by its [CLS] token is seen from gradients, so with relevance only.
        pixels: float (B, 3, S, S), on the model's device.
        classes: The classes (B,) that relevance is for, or one for all; default: the predicted.
        relevance: Whether to compute it.
    """
    count = model.config.num_labels
    if isinstance(classes, int):
        classes = torch.full((len(pixels),), classes)
    if classes is not None and not ((classes >= 0) & (classes < count)).all():
        wrong = classes[(classes < 0) | (classes >= count)][0].item()
        raise ValueError(f"There is no class {wrong}: the model has {count}, 0 to {count - 1}.")
    with _eager(model), torch.set_grad_enabled(relevance):
        # Gradients start at the pixels, so that a model with frozen weights has them too.
        pixels = pixels.detach().requires_grad_(relevance)
        output = model(pixels, output_attentions=True)
        attentions = getattr(output, "attentions", None) or ()  # L of (B, H, T, T)
        attentions = tuple(a for a in attentions if a is not None)  # Data2Vec has none to give
        grid = _grid(model, pixels, attentions)
        if classes is None:
            classes = output.logits.argmax(dim=1)
        classes = classes.to(output.logits.device)
        if relevance:
            class_logits = output.logits.gather(1, classes[:, None]).sum()
            gradients = torch.autograd.grad(class_logits, attentions)
            last = gradients[-1]
            if last.any() and not last[..., 0, :].any():  # the mean of the patches counts
                raise ValueError(_NO_MAPS.format(type(model).__name__))
    attentions = [a.detach() for a in attentions]
    return Maps(
        logits=output.logits.detach(),
        heads=torch.stack([_class_row(a, grid) for a in attentions], dim=1),
        rollout=_class_row(rollout(attentions), grid),
        classes=classes,
        relevance=_class_row(class_relevance(attentions, gradients), grid) if relevance else None,
    )


def rollout(attentions: list[Tensor]) -> Tensor:
    """Return the attention rollout of L of (B, H, T, T): (B, T, T), rows summing to 1."""
    size = attentions[0].shape[-1]
    identity = torch.eye(size, device=attentions[0].device)
    total = identity.expand(len(attentions[0]), -1, -1)
    for attention in attentions:
        mixed = (attention.mean(dim=1) + identity) / 2  # half through the residual connection
        total = mixed @ total  # (B, T, T)
    return total


def class_relevance(attentions: list[Tensor], gradients: tuple[Tensor, ...]) -> Tensor:
    """Return the relevance (B, T, T) from attentions and a logit's gradients, L of (B, H, T, T).

    R starts as the identity; each layer adds E_h[(gradient * attention)+] @ R.
    """
    size = attentions[0].shape[-1]
    total = torch.eye(size, device=attentions[0].device).expand(len(attentions[0]), -1, -1)
    for attention, gradient in zip(attentions, gradients, strict=True):
        positive = (attention * gradient.float()).clamp(min=0)  # float32, also from bfloat16
        total = total + positive.mean(dim=1) @ total
    return total


def overlay(
    image: Image.Image, values: np.ndarray, size: int = 224, opacity: float = 0.8
) -> Image.Image:
    """Lay a map (h, w) over an image that keeps its own colors, darker where attention is higher.

    The longer side of the result has at least `size` pixels. `opacity`, from 0 to 1, is that of the
    highest attention; it falls to 0 for the lowest.
    """
    image = fit_size(image, size)
    smooth = Image.fromarray(normalized(values).astype(np.float32))
    smooth = np.asarray(smooth.resize(image.size, Image.Resampling.BICUBIC))
    attention = smooth.clip(0, 1)  # (H, W); bicubic goes beyond the range
    veiled = VEIL + (1 - VEIL) * np.asarray(image) / 255  # (H, W, 3), 0 to 1
    alpha = opacity * attention[..., None]
    mixed = (1 - alpha) * veiled + alpha * COLORMAP(attention)[..., :3]
    return Image.fromarray((255 * mixed).round().astype(np.uint8))


def fit_size(image: Image.Image, size: int = 224) -> Image.Image:
    """Return the image in RGB, its longer side enlarged to `size` or reduced to MAX_SIDE."""
    longer = max(image.size)
    scale = min(max(longer, size), MAX_SIDE) / longer
    sides = [max(1, round(side * scale)) for side in image.size]
    return image.convert("RGB").resize(sides, Image.Resampling.BICUBIC)


def normalized(values: np.ndarray) -> np.ndarray:
    """Return the values stretched to 0..1; all 0 if they are all the same."""
    values = np.asarray(values, dtype=np.float64)
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else np.zeros_like(values)


@contextmanager
def _eager(model) -> Iterator[None]:
    """Use eager attention, the only kind that returns its weights, and restore the setting."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _grid(model, pixels: Tensor, attentions) -> tuple[int, int]:
    """Return the patches down and across; ValueError if a token does not see every patch."""
    patch = getattr(model.config, "patch_size", None)
    if attentions and isinstance(patch, int):
        height, width = (side // patch for side in pixels.shape[-2:])
        shapes = {tuple(a.shape) for a in attentions}
        if len(shapes) == 1 and attentions[0].shape[-1] > height * width:
            return height, width
    raise ValueError(_NO_MAPS.format(type(model).__name__))


def _class_row(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cut (..., T, T) to (..., h, w): [CLS] is first, patches last, other tokens between."""
    return attention[..., 0, -grid[0] * grid[1] :].unflatten(-1, grid)
