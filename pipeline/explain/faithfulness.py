"""Faithfulness of attention maps by deletion and insertion curves.

Petsiuk et al. 2018, arXiv:1806.07421, over patches in the order of the map. Deletion masks the
highest patches first: a lower curve is better. Insertion starts from a gray image and restores the
highest patches first: a higher curve is better.
"""

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from pipeline.data.decoding import DecodedImages
from pipeline.data.transforms import preprocess
from pipeline.errors import UserError
from pipeline.explain.attention import METHODS, compute_maps

KINDS = ("deletion", "insertion")
STEPS = 9  # points on a curve, from no patch to all patches
RESAMPLES = 2000
BATCH = 16  # images; limits memory: a ViT-B's attentions take 22 MB per image at 224 px


def measure_faithfulness(
    model, processor, dataset: Dataset, count: int, head: int, seed: int = 0
) -> dict:
    """Measure each method on `count` images of a decoded split, drawn by `seed`.

    Args:
        model: An image classifier with attention maps.
        processor: Its image processor.
        dataset: A decoded split.
        count: The number of images to measure on.
        head: The head, from 0, used by the method `head`.
        seed: Seed for the images, the random order and the bootstrap.

    Returns:
        `methods`, see `summarize`, and the mean `curves` of each method.

    Raises:
        UserError: There are fewer images than `count`, or the model has no maps.
    """
    if not 0 < count <= len(dataset):
        raise UserError(f"Faithfulness needs 1 to {len(dataset)} images, not {count}.")
    rows = np.sort(np.random.default_rng(seed).choice(len(dataset), count, replace=False))
    images, generator = DecodedImages(dataset), torch.Generator().manual_seed(seed)
    batches: list[dict[str, Tensor]] = []
    for start in range(0, count, BATCH):
        pixels = images.batch(rows[start : start + BATCH])["pixel_values"].to(model.device)
        try:
            batches.append(
                deletion_insertion_curves(model, preprocess(pixels, processor), head, generator)
            )
        except ValueError as error:
            raise UserError(str(error)) from None
    # (2, N, STEPS) by method
    curves = {m: torch.cat([b[m] for b in batches], dim=1).cpu().numpy() for m in batches[0]}
    aucs = {m: dict(zip(KINDS, auc(c), strict=True)) for m, c in curves.items()}
    return {
        "images": count,
        "seed": seed,
        "head": head,
        "methods": summarize(aucs, seed),
        "curves": {
            m: dict(zip(KINDS, c.mean(axis=1).tolist(), strict=True)) for m, c in curves.items()
        },
    }


def deletion_insertion_curves(
    model, pixels: Tensor, head: int = 0, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return curves (2, B, STEPS), of deletion and insertion, by method, including random order.

    A curve is the predicted class's probability at each step, for pixels float (B, 3, S, S).
    """
    maps = compute_maps(model, pixels)
    orders = {method: maps.select(method, head=head) for method in METHODS}
    orders["random"] = torch.rand(maps.rollout.shape, generator=generator).to(pixels.device)
    return {
        method: torch.stack(
            [_curve(model, pixels, maps.classes, order, insertion) for insertion in (False, True)]
        )
        for method, order in orders.items()
    }


def summarize(aucs: dict[str, dict[str, np.ndarray]], seed: int = 0) -> dict:
    """Summarize the area under each curve, and compare it with random order by bootstrap.

    Args:
        aucs: One area per image, (N,), by method and kind.
        seed: Seed for the bootstrap.

    Returns:
        By method and kind: `auc`; except for random order, also
        `gain_over_random` on the same images (positive is better), `gain_interval`, and
        `beats_random`, which is true if that interval is above 0.
    """
    count = len(aucs["random"]["deletion"])
    # Resample the same images for all methods.
    samples = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    summary: dict[str, dict] = {}
    for method, kinds in aucs.items():
        for kind, values in kinds.items():
            entry = {"auc": float(values.mean())}
            if method != "random":
                gain = values - aucs["random"][kind]
                gain = -gain if kind == "deletion" else gain
                interval = _interval(gain[samples])
                entry |= {
                    "gain_over_random": float(gain.mean()),
                    "gain_interval": interval,
                    "beats_random": len(gain) > 1 and interval[0] > 0,
                }
            summary.setdefault(method, {})[kind] = entry
    return summary


def auc(curve: np.ndarray) -> np.ndarray:
    """Return the areas (..., N) under curves (..., N, STEPS) over the share of patches, 0 to 1."""
    return np.trapezoid(curve, dx=1 / (curve.shape[-1] - 1), axis=-1)


@torch.inference_mode()
def _curve(model, pixels: Tensor, classes: Tensor, values: Tensor, insertion: bool) -> Tensor:
    """Return class probabilities (B, STEPS) as patches are masked or inserted, highest first."""
    ranks = values.flatten(1).argsort(dim=1, descending=True).argsort(dim=1)  # (B, h*w)
    ranks = ranks.view(values.shape)
    patch = [
        side // cells for side, cells in zip(pixels.shape[-2:], values.shape[-2:], strict=True)
    ]
    points = []
    for share in np.linspace(0, 1, STEPS):
        first = ranks < round(share * ranks[0].numel())  # (B, h, w), the highest so far
        visible = first if insertion else ~first
        mask = visible.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)[:, None]
        # 0 is the mean color after normalization: gray.
        probs = model(pixels * mask).logits.softmax(dim=1)
        points.append(probs.gather(1, classes[:, None])[:, 0])
    return torch.stack(points, dim=1)


def _interval(resampled: np.ndarray) -> list[float]:
    return np.quantile(resampled.mean(axis=1), [0.025, 0.975]).tolist()
