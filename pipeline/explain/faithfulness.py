"""How faithful a map is: what the model still says without, or with only, its patches.

Deletion and insertion, Petsiuk et al. 2018, arXiv:1806.07421, over patches in the order of
the map. Deletion greys out the highest first: the lower its curve, the better. Insertion
starts from a grey image and brings them back: the higher, the better.
"""

import numpy as np
import torch
from torch import Tensor

from pipeline.attention import explain

STEPS = 9  # points of a curve, from no patch to all
RESAMPLES = 2000


def curves(
    model, pixels: Tensor, head: int = 0, generator: torch.Generator | None = None
) -> dict[str, dict[str, Tensor]]:
    """For each method and for random order: {"deletion", "insertion"} of (B, STEPS).

    The probability of the predicted class after each step, for pixels float (B, 3, S, S).
    """
    maps = explain(model, pixels)
    scores = {
        "mean": maps.select("mean"),
        "head": maps.select("head", head=head),
        "rollout": maps.rollout,
        "relevance": maps.relevance,
        "random": torch.rand(maps.rollout.shape, generator=generator).to(pixels.device),
    }
    return {
        name: {
            kind: _curve(model, pixels, maps.classes, values, kind == "insertion")
            for kind in ("deletion", "insertion")
        }
        for name, values in scores.items()
    }


def summary(areas: dict[str, dict[str, np.ndarray]], seed: int = 0) -> dict:
    """The mean area under each curve with its 95 % bootstrap interval, and against random.

    `areas[method][kind]` holds one area an image, (N,). `better_by` is how much better than
    random order on the same images, positive is better; `beats_random` where its interval
    lies above 0.
    """
    random = np.random.default_rng(seed)
    count = len(areas["random"]["deletion"])
    drawn = random.integers(0, count, (RESAMPLES, count))  # the same images for all
    result = {}
    for method, kinds in areas.items():
        result[method] = {}
        for kind, values in kinds.items():
            entry = {"area": float(values.mean()), "interval": _interval(values[drawn])}
            if method != "random":
                gain = values - areas["random"][kind]
                gain = -gain if kind == "deletion" else gain
                interval = _interval(gain[drawn])
                entry |= {
                    "better_by": float(gain.mean()),
                    "better_by_interval": interval,
                    "beats_random": interval[0] > 0,
                }
            result[method][kind] = entry
    return result


def area(curve: np.ndarray) -> np.ndarray:
    """Area under curves (N, STEPS) over the share of patches, 0 to 1: (N,)."""
    return np.trapezoid(curve, dx=1 / (curve.shape[1] - 1), axis=1)


@torch.inference_mode()
def _curve(model, pixels: Tensor, classes: Tensor, values: Tensor, insertion: bool) -> Tensor:
    """The classes' probabilities (B, STEPS) as patches go, or come back, highest first."""
    ranks = values.flatten(1).argsort(dim=1, descending=True).argsort(dim=1)  # (B, h*w)
    ranks = ranks.view(values.shape)
    patch = [
        side // cells for side, cells in zip(pixels.shape[-2:], values.shape[-2:], strict=True)
    ]
    points = []
    for share in np.linspace(0, 1, STEPS):
        first = ranks < round(share * ranks[0].numel())  # (B, h, w), the highest so far
        shown = first if insertion else ~first
        mask = shown.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)[:, None]
        # 0 is the mean colour after normalisation: grey.
        probabilities = model(pixels * mask).logits.softmax(dim=1)
        points.append(probabilities.gather(1, classes[:, None])[:, 0])
    return torch.stack(points, dim=1)


def _interval(resampled: np.ndarray) -> list[float]:
    return np.quantile(resampled.mean(axis=1), [0.025, 0.975]).tolist()
