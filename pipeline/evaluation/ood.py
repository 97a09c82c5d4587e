"""Whether a picture is like those a model was trained on, told from its logits.

The score is the energy of Liu et al. 2020, arXiv:2010.03759, with its sign turned: the
logarithm of the sum of the exponentials of the logits. The threshold is fitted so that 95 % of
the validation images pass; how many others pass is measured on pictures of other things that
scikit-learn ships: handwritten digits, and pieces of two photographs, of a temple and of a
flower.
"""

import datasets
from PIL import Image
from torch import Tensor

from pipeline.data import decode, digits

PASSING = 0.95
SIDE = 64  # pixels of a piece of a photograph
DIGITS = 500


def scores(logits: Tensor) -> Tensor:
    """(N, C) to (N,): the higher, the more like the training images."""
    return logits.logsumexp(dim=1)


def fit(logits: Tensor) -> float:
    """The score that PASSING of the validation images, logits (N, C), reach."""
    return scores(logits).quantile(1 - PASSING).item()


def share(logits: Tensor, threshold: float) -> float:
    """How many of the images, logits (N, C), reach the threshold."""
    return (scores(logits) >= threshold).double().mean().item()


def other_pictures(image_size: int, resample: int) -> dict[str, datasets.Dataset]:
    """Decoded pictures of other things, by what they are; see `data.load_splits`."""
    found = {"handwritten digits": digits().select(range(DIGITS)), "photographs": _pieces()}
    return {name: decode(d, name, image_size, resample) for name, d in found.items()}


def _pieces() -> datasets.Dataset:
    from sklearn.datasets import load_sample_images

    images = [
        Image.fromarray(photograph[top : top + SIDE, left : left + SIDE])
        for photograph in load_sample_images().images  # (427, 640, 3) each
        for top in range(0, photograph.shape[0] - SIDE + 1, SIDE)
        for left in range(0, photograph.shape[1] - SIDE + 1, SIDE)
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["other"])}
    )
    return datasets.Dataset.from_dict(
        {"image": images, "label": [0] * len(images)}, features=features
    )
