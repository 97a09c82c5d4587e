"""Out-of-distribution (OOD) detection by the energy score, and what it is measured on.

The score is the negative energy of Liu et al. 2020, arXiv:2010.03759: the logarithm of the sum of
the exponentials of the logits. The threshold is fitted so that TARGET_TPR of the validation images
pass; how many others pass is measured on images of other things that scikit-learn ships:
handwritten digits, and tiles of two photographs, of a temple and of a flower.
"""

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from pipeline.data.decoding import decode
from pipeline.data.sources import digits

TARGET_TPR = 0.95
TILE = 64  # pixels, side of a tile of a photograph
DIGITS = 500


def energy_score(logits: Tensor) -> Tensor:
    """Score logits (N, C), as (N,): the higher, the more like the training images."""
    return logits.logsumexp(dim=1)


def fit_threshold(logits: Tensor) -> float:
    """Return the score that TARGET_TPR of the validation images, logits (N, C), reach."""
    return energy_score(logits).quantile(1 - TARGET_TPR).item()


def pass_rate(logits: Tensor, threshold: float) -> float:
    """Return the share of images, logits (N, C), that reach the threshold."""
    return (energy_score(logits) >= threshold).double().mean().item()


def ood_datasets(image_size: int, resample: int, crop: bool = False) -> dict[str, datasets.Dataset]:
    """Return decoded images of other things, by name; see `decoding.decode` for the arguments."""
    sources = {"handwritten digits": digits().select(range(DIGITS)), "photographs": _tiles()}
    return {
        name: decode(
            source.add_column("row", np.arange(len(source))), image_size, resample, crop=crop
        )
        for name, source in sources.items()
    }


def _tiles() -> datasets.Dataset:
    images = [
        Image.fromarray(photograph[top : top + TILE, left : left + TILE])
        for photograph in load_sample_images().images  # (427, 640, 3) each
        for top in range(0, photograph.shape[0] - TILE + 1, TILE)
        for left in range(0, photograph.shape[1] - TILE + 1, TILE)
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["other"])}
    )
    columns = {"image": images, "label": [0] * len(images)}
    return datasets.Dataset.from_dict(columns, features=features)
