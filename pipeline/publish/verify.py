"""Download a published model as anybody would, and check that what its card says is true."""

import secrets
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import pipeline

from pipeline import runs
from pipeline.data.decoding import DecodedImages, content_hash
from pipeline.data.loading import load_split
from pipeline.errors import UserError
from pipeline.evaluation.metrics import ImageClassification
from pipeline.publish import card, staging
from pipeline.publish.hub import HUB_MANAGED_FILES, Repository
from pipeline.recipe import data_arguments

SAMPLE_SIZE = 1000  # images
TIE = 1e-3  # classes whose probabilities are closer than this may change places


class Verification(NamedTuple):
    """A verified commit, and the number of test images that were drawn with `seed`."""

    commit: str
    images: int
    seed: int


def verify(
    repository: Repository,
    revision: str | None = None,
    images: int | None = SAMPLE_SIZE,
    dataset: str | None = None,
    seed: int | None = None,
) -> Verification:
    """Check files, card, metrics and predictions; UserError that names the first failed check.

    Args:
        images: Size of the random sample to classify again; None for all test images.
        dataset: Another place of the same dataset, such as a local folder.
    """
    seed = secrets.randbelow(2**32) if seed is None else seed
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        api, name, request = repository.api, repository.name, repository.request
        commit = request(api.repo_info, revision=revision).sha
        folder = Path(request(api.snapshot_download, revision=commit, cache_dir=cache))
        checksums = request(api.verify_repo_checksums, revision=commit, cache_dir=cache)
        try:
            if corrupt := [m["path"] for m in checksums.mismatches] + checksums.missing_paths:
                raise UserError(f"The download of {', '.join(corrupt)} is corrupt.")
            results = _check_files(folder, name)
            split = DecodedImages(_load_split(folder, results, dataset))
            _check_metrics(results, split.labels)
            rows = np.random.default_rng(seed).permutation(len(split))[:images]
            _check_predictions(folder, results, split, rows)
        except UserError as error:
            raise UserError(f"Verification of {name} @ {commit[:12]} failed. {error}") from None
    return Verification(commit, len(rows), seed)


def _check_files(folder: Path, repo: str) -> dict:
    """Check that files, results and card belong together; return the results."""
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if missing := sorted({"README.md", *runs.MODEL_FILES, staging.EVALUATION} - paths):
        raise UserError(f"It has no {', '.join(missing)}.")
    results, faithfulness = staging.read_results(folder)
    text, files = (folder / "README.md").read_bytes().decode(), sorted(paths - HUB_MANAGED_FILES)
    if lines := card.card_mismatches(text, results, repo, files, faithfulness):
        raise UserError("\n".join(["The card is not the one that its results give:", *lines]))
    return results


def _load_split(folder: Path, results: dict, dataset: str | None) -> Dataset:
    """Load the split of the evaluation, with its images decoded; see `load_split`."""
    info, resample = results["dataset"], runs.read_json(folder / runs.MODEL_FILES[2])["resample"]
    data = data_arguments(str(folder), dataset or info["name"])
    if dataset is None:
        data = replace(data, dataset_config=info["config"], dataset_revision=info["revision"])
    split = load_split(data, info["split"], results["model"]["image_size"], resample)
    if content_hash(split) != info["sha256"] or split.features["label"].names != results["labels"]:
        raise UserError(f"The {info['split']} images are not those it was evaluated on.")
    return split


def _check_metrics(results: dict, labels: np.ndarray) -> None:
    """Compute all metrics again that follow from predictions and labels (N,): not nll and ece."""
    predictions, num_classes = np.asarray(results["predictions"]), len(results["labels"])
    if predictions.shape != labels.shape or not set(predictions) <= set(range(num_classes)):
        raise UserError("The results do not have one prediction for each image.")
    logits = np.eye(num_classes, dtype=np.float32)[predictions]  # (N, C)
    scores = ImageClassification(keep_in_memory=True).compute(predictions=logits, references=labels)
    for name in [name for name in scores if name not in ("nll", "ece")]:
        if not np.array_equal(np.round(results[name], 6), np.round(scores[name], 6)):
            raise UserError(f"The published {name} does not follow from the predictions.")


def _check_predictions(folder: Path, results: dict, split: DecodedImages, rows) -> None:
    """Classify the images of `rows` (n,) and compare with the published predictions."""
    classifier = pipeline("image-classification", model=str(folder), trust_remote_code=False)
    pixels = split.batch(rows)["pixel_values"].permute(0, 2, 3, 1)  # (n, H, W, 3)
    images = [Image.fromarray(array) for array in pixels.numpy()]
    answers = classifier(images, top_k=len(results["labels"]), batch_size=64)
    different = 0
    for row, answer in zip(rows, answers, strict=True):
        probs = {entry["label"]: entry["score"] for entry in answer}
        label = results["labels"][results["predictions"][row]]
        different += probs.get(label, 0) < max(probs.values()) - TIE
    if different:
        raise UserError(f"{different} of {len(rows)} predictions are not the published ones.")
