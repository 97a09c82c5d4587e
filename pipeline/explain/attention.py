"""Attention maps of a Vision Transformer, and their overlay on the image.

The published Space ships this file, so it imports nothing from the project.
- `mean`, `head`: the [CLS] row of a layer's attention over the patches, averaged over the heads
  or for one head (Dosovitskiy et al. 2021, arXiv:2010.11929).
- `rollout`: the product of all layers' attention, each averaged over its heads and mixed with
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
# Pale to dark purple, perceptually uniform: readable in grayscale and by color-blind people.
COLORMAP = ListedColormap(colormaps["magma_r"](np.linspace(0, 0.88, 256)), "attention")
VEIL = 0.35  # share of white mixed into the image, so that dark colors show on dark images
MAX_SIDE = 1024  # pixels of the longer side of an overlay
_NO_MAPS = (
    "{} has no global attention with a [CLS] token used for classification, so there is no map to "
    "draw. Use a ViT, DeiT or DINOv2 model."
)


@dataclass
class Maps:
    """The maps of a batch of B images over h x w patches, from one forward pass."""

    logits: Tensor  # (B, C)
    heads: Tensor  # (B, L, H, h, w), the [CLS] row of each head of each layer
    rollout: Tensor  # (B, h, w)
    classes: Tensor  # int64 (B,), the target classes of relevance
    relevance: Tensor | None  # (B, h, w), None if it was not requested

    def select(self, method: str, layer: int = -1, head: int = 0) -> Tensor:
        """Return the maps (B, h, w) of one method; ValueError for an unknown method or index.

        Layers and heads are numbered from 0, or backward from -1.
        """
        layers, heads = self.heads.shape[1:3]
        if not -layers <= layer < layers:
            raise ValueError(f"There is no layer {layer}; choose from 0 to {layers - 1}.")
        if not -heads <= head < heads:
            raise ValueError(f"There is no head {head}; choose from 0 to {heads - 1}.")
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
        model: A transformers image classifier with global attention, otherwise ValueError. Whether
            it classifies by its [CLS] token is checked by gradients, so only with relevance.
        pixels: float (B, 3, S, S), on the model's device.
        classes: The target classes (B,) of relevance, or one for all; default: the predicted ones.
        relevance: Whether to compute relevance.
    """
    count = model.config.num_labels
    if isinstance(classes, int):
        classes = torch.full((len(pixels),), classes)
    if classes is not None and not ((classes >= 0) & (classes < count)).all():
        wrong = classes[(classes < 0) | (classes >= count)][0].item()
        raise ValueError(f"There is no class {wrong}; choose from 0 to {count - 1}.")
    with _eager(model), torch.set_grad_enabled(relevance):
        # Gradients start at the pixels, so that they also exist with frozen weights.
        pixels = pixels.detach().requires_grad_(relevance)
        output = model(pixels, output_attentions=True)
        attentions = getattr(output, "attentions", None) or ()  # L of (B, H, T, T)
        attentions = tuple(a for a in attentions if a is not None)  # Data2Vec returns None
        grid = _grid(model, pixels, attentions)
        if classes is None:
            classes = output.logits.argmax(dim=1)
        classes = classes.to(output.logits.device)
        if relevance:
            class_logits = output.logits.gather(1, classes[:, None]).sum()
            gradients = torch.autograd.grad(class_logits, attentions)
            last = gradients[-1]
            if last.any() and not last[..., 0, :].any():  # it classifies by mean-pooled patches
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
    """Return the rollout (B, T, T), with rows summing to 1, of L attentions (B, H, T, T)."""
    size = attentions[0].shape[-1]
    identity = torch.eye(size, device=attentions[0].device)
    total = identity.expand(len(attentions[0]), -1, -1)
    for attention in attentions:
        mixed = (attention.mean(dim=1) + identity) / 2  # half through the residual connection
        total = mixed @ total  # (B, T, T)
    return total


def class_relevance(attentions: list[Tensor], gradients: tuple[Tensor, ...]) -> Tensor:
    """Return the relevance (B, T, T) from attentions and a logit's gradients, L times (B, H, T, T).

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
    """Overlay a map (h, w) on an image in its own colors, darker where attention is higher.

    The longer side of the result has at least `size` pixels. The overlay's opacity increases from 0
    at the lowest attention to `opacity`, at most 1, at the highest.
    """
    image = fit_size(image, size)
    smooth = Image.fromarray(normalized(values).astype(np.float32))
    smooth = np.asarray(smooth.resize(image.size, Image.Resampling.BICUBIC))
    attention = smooth.clip(0, 1)  # (H, W); bicubic interpolation overshoots the range
    veiled = VEIL + (1 - VEIL) * np.asarray(image) / 255  # (H, W, 3), 0 to 1
    alpha = opacity * attention[..., None]
    mixed = (1 - alpha) * veiled + alpha * COLORMAP(attention)[..., :3]
    return Image.fromarray((255 * mixed).round().astype(np.uint8))


def fit_size(image: Image.Image, size: int = 224) -> Image.Image:
    """Return the image in RGB, with its longer side enlarged to `size` or reduced to MAX_SIDE."""
    longer = max(image.size)
    scale = min(max(longer, size), MAX_SIDE) / longer
    sides = [max(1, round(side * scale)) for side in image.size]
    return image.convert("RGB").resize(sides, Image.Resampling.BICUBIC)


def normalized(values: np.ndarray) -> np.ndarray:
    """Return the values rescaled to the range 0 to 1; all 0 if they are all equal."""
    values = np.asarray(values, dtype=np.float64)
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else np.zeros_like(values)


@contextmanager
def _eager(model) -> Iterator[None]:
    """Use eager attention, the only one that returns its weights, then restore the setting."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _grid(model, pixels: Tensor, attentions) -> tuple[int, int]:
    """Return the rows and columns of patches; ValueError if tokens don't attend to all patches."""
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
