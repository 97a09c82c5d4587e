"""Out-of-distribution (OOD) detection: three scores, a threshold, and their performance.

The higher the score, the more an image looks like the training images:
- energy: the logarithm of the sum of the exponentials of the logits, Liu et al. 2020,
  arXiv:2010.03759.
- msp: the maximum softmax probability, Hendrycks & Gimpel 2017, arXiv:1610.02136.
- mahalanobis: the negative squared Mahalanobis distance between a middle layer's features and those
  of validation images, Lee et al. 2018, arXiv:1807.03888, with one Gaussian for all classes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from scipy.stats import rankdata
from sklearn.covariance import LedoitWolf
from sklearn.datasets import load_sample_images
from sklearn.feature_extraction.image import extract_patches_2d
from torch import Tensor

from pipeline import runs
from pipeline.data.decoding import decode
from pipeline.data.sources import digits
from pipeline.errors import UserError
from pipeline.evaluation.metrics import wilson_interval

SCORES = ("energy", "msp", "mahalanobis")
TARGET_TPR = 0.95
DEPTH = 0.5  # the middle layer
FEATURES = 64  # evenly spaced features of that layer, which keep the published covariance small
IMAGES, FEWEST = 500, 20  # per OOD dataset
BUILTIN = ("handwritten digits", "photographs", "uniform noise", "shuffled patches")
DIGITS = {*"0123456789"}
TILE = 64  # pixels, side of a photograph tile
GRID = 4  # patches per side of an image whose patches are shuffled


class Detector(NamedTuple):
    """An image counts as in-distribution if its score reaches the threshold."""

    name: str  # one of SCORES
    threshold: float
    mean: Tensor | None = None  # float64 (FEATURES,), for mahalanobis
    precision: Tensor | None = None  # float64 (FEATURES, FEATURES)

    def score(self, logits: Tensor, features: Tensor) -> Tensor:
        """Return scores (N,) for logits (N, C) or features (N, D) of `pool_layer` at DEPTH."""
        if self.name == "energy":
            return logits.logsumexp(dim=1)
        if self.name == "msp":
            return logits.softmax(dim=1).amax(dim=1)
        difference = _choose(features) - self.mean
        return -(difference @ self.precision * difference).sum(dim=1).float()


def load_detector(model: str) -> Detector | None:
    """Return the detector from an evaluation of exactly these model files; None without one."""
    name, hashes = "evaluation_results.json", runs.model_hashes(model)
    for path in (runs.results_folder(model) / name, runs.model_file(model, name)):
        results = path and runs.read_json(path)
        if results and results["model"]["sha256"] == hashes and results["ood"]:
            entry = results["ood"]
            gaussian = (torch.tensor(v, dtype=torch.float64) for v in entry["gaussian"])
            return Detector(entry["score"], entry["threshold"], *gaussian)
    return None


def measure_ood(
    run: Callable[..., tuple], processor, validation: tuple, test: tuple, images: datasets.Dataset,
    split: str, classes: list[str], others: dict[str, datasets.Dataset],
) -> dict:  # fmt: skip
    """Fit a detector for each score, measure them on OOD datasets, and choose the best.

    The best has the lowest mean false positive rate on one half of each built-in OOD dataset. The
    reported values are measured on the other half.

    Args:
        run: `predict` for one model, with features at DEPTH.
        processor: The model's image processor.
        validation: The output of `run` for the validation split.
        test: The output of `run` for the evaluated split.
        images: The decoded images of that split, which are also used with shuffled patches.
        split: The name of that split.
        classes: The class names. Handwritten digits are not OOD for a classifier of digits.
        others: Further OOD datasets, see `load_others`.

    Returns:
        The detector (`score`, `threshold`, `gaussian`), its `pass_rate` on both splits, its false
        positive rate (`ood_datasets`) and `auroc` by OOD dataset, and these for all `scores`.
    """
    sets = ood_datasets(processor)
    if {*classes} == DIGITS:
        del sets["handwritten digits"]
    outputs = {name: run(data) for name, data in sets.items()}
    part = images.shuffle(seed=0).select(range(min(IMAGES, len(images))))
    outputs["shuffled patches"] = run(part, transform=shuffle_patches)
    builtin = list(outputs)
    outputs |= {name: run(data) for name, data in others.items()}

    # The Gaussian is fit on every second validation image, the threshold on the others.
    gaussian = LedoitWolf().fit(_choose(validation[2])[::2].numpy())
    gaussian = torch.from_numpy(gaussian.location_), torch.from_numpy(gaussian.precision_)
    table, rates, detectors = {}, {}, {}
    for name in SCORES:
        detector = Detector(name, 0.0, *gaussian)
        scores = {key: detector.score(o[0], o[2]) for key, o in outputs.items()}
        inside, held_out = (detector.score(o[0], o[2]) for o in (test, validation))
        held_out = _second_half(held_out)
        threshold = held_out.quantile(1 - TARGET_TPR).item()
        rates[name] = np.mean([_pass_rate(scores[key][::2], threshold) for key in builtin])
        passed = {"validation": held_out, split: inside}
        passed = {key: _pass_rate(values, threshold) for key, values in passed.items()}
        detectors[name] = {"score": name, "threshold": threshold, "pass_rate": passed}
        table[name] = {}
        for key, values in scores.items():
            area, interval = auroc(inside, _second_half(values))
            rate, count = _pass_rate(_second_half(values), threshold), len(_second_half(values))
            table[name][key] = {
                "auroc": area,
                "auroc_interval": interval,
                "fpr95": rate,
                "fpr95_interval": wilson_interval(round(rate * count), count),
            }
    best = min(SCORES, key=rates.get)
    return detectors[best] | {
        "gaussian": [x.tolist() for x in gaussian] if best == "mahalanobis" else [],
        "target_tpr": TARGET_TPR,
        "ood_datasets": {name: entry["fpr95"] for name, entry in table[best].items()},
        "auroc": {name: entry["auroc"] for name, entry in table[best].items()},
        "scores": table,
    }


def auroc(inside: Tensor, outside: Tensor) -> tuple[float, list[float]]:
    """Return the AUROC of scores (N,) and (M,), and its 95 % interval (DeLong et al. 1988).

    The interval is meaningless (of zero width) for an AUROC of exactly 0 or 1.
    """
    n, m = len(inside), len(outside)
    ranks = rankdata(torch.cat([inside, outside]))
    # The share of the other group from which each image is separated: (N,) and (M,).
    shares = (ranks[:n] - rankdata(inside)) / m, 1 - (ranks[n:] - rankdata(outside)) / n
    variance = sum(x.var(ddof=int(len(x) > 1)) / len(x) for x in shares)
    area, reach = shares[0].mean(), 1.96 * variance**0.5
    return float(area), [float(max(0.0, area - reach)), float(min(1.0, area + reach))]


def ood_datasets(processor) -> dict[str, datasets.Dataset]:
    """Return the built-in OOD datasets by name, decoded for a model with this image processor."""
    noise = np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), np.uint8)
    tiles = [  # from photographs of a temple and a flower
        tile
        for photograph in load_sample_images().images
        for tile in extract_patches_2d(photograph, (TILE, TILE), max_patches=60, random_state=0)
    ]
    return {
        "handwritten digits": _decode(digits()["image"][:IMAGES], processor),
        "photographs": _decode([Image.fromarray(tile) for tile in tiles], processor),
        "uniform noise": _decode([Image.fromarray(pixels) for pixels in noise], processor),
    }


def load_others(sources: tuple[str, ...], split: str, processor) -> dict[str, datasets.Dataset]:
    """Load a user's OOD datasets, folders or Hub ids, by name; UserError if one can't be used."""
    taken, others = {*BUILTIN, "validation", split}, {}
    for source in sources:
        name = Path(source).name
        if name in taken:
            raise UserError(
                f'There are two OOD datasets or splits of the name "{name}": rename the folder '
                f'"{source}", or evaluate with one at a time.'
            )
        taken.add(name)
        others[name] = load_images(source, processor)
        if len(others[name]) < FEWEST:
            count = len(others[name])
            raise UserError(f'"{source}" has {count} images; OOD detection needs {FEWEST}.')
    return others


def load_images(name: str, processor) -> datasets.Dataset:
    """Load IMAGES random images from a folder or from a dataset on the Hub, labeled or not."""
    try:
        splits = datasets.load_dataset(name)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise UserError(f'Cannot load the OOD dataset "{name}": {error}') from None
    split = splits.get("test", next(iter(splits.values())))
    columns = [c for c, kind in split.features.items() if isinstance(kind, datasets.Image)]
    if not columns:
        raise UserError(f'The OOD dataset "{name}" has no image column: choose another dataset.')
    return _decode(split.shuffle(seed=0)[columns[0]][:IMAGES], processor)


def shuffle_patches(images: Tensor) -> Tensor:
    """Shuffle the GRID x GRID patches of each image (B, 3, H, W), in the same order for all."""
    order = torch.randperm(GRID**2, generator=torch.Generator().manual_seed(0))
    height, width = (side // GRID for side in images.shape[-2:])
    patches = images.unfold(2, height, height).unfold(
        3, width, width
    )  # (B, 3, rows, columns, h, w)
    patches = patches[:, :, :GRID, :GRID].flatten(2, 3)[:, :, order].unflatten(2, (GRID, GRID))
    return patches.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def _pass_rate(scores: Tensor, threshold: float) -> float:
    return (scores >= threshold).double().mean().item()


def _second_half(values: Tensor) -> Tensor:
    return values[int(len(values) > 1) :: 2]  # a single image is kept


def _choose(features: Tensor) -> Tensor:
    count = features.shape[1]
    columns = torch.linspace(0, count - 1, min(FEATURES, count)).round().long()
    return features[:, columns].double()


def _decode(images: list[Image.Image], processor) -> datasets.Dataset:
    columns = {"image": images, "row": range(len(images)), "label": [0] * len(images)}
    return decode(datasets.Dataset.from_dict(columns), processor)
