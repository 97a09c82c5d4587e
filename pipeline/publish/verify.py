"""Download a published model as anybody would, and check that what its card says is true."""

import secrets
import tempfile
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from safetensors import SafetensorError
from transformers import pipeline

from pipeline import runs
from pipeline.data.decoding import DecodedImages
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import measure_ood
from pipeline.evaluation.metrics import ImageClassification
from pipeline.publish import card, provenance, staging
from pipeline.publish.hub import HUB_MANAGED_FILES, PUBLICATION, Repository
from pipeline.recipe import DataArguments

SAMPLE_SIZE = 1000  # images
BATCH = 250  # images in memory at once
TIE = 1e-3  # classes whose probabilities are closer than this may change places
TOLERANCE = {
    "nll": 1e-3,
    "ece": 2e-3,
    "OOD": 0.01,
    "confidence": 0.01,
}  # other processors round otherwise
EXAMPLE_TOLERANCE = 16  # mean difference of gray levels, of JPEG
# Files beside the published ones that nothing loads; a pickle, code or another config is refused.
HARMLESS = {"", ".md", ".txt", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".pdf", ".csv", ".onnx"}
UNVERIFIED = "training (length, hardware, checkpoint), curves, attention maps, license"


class Verification(NamedTuple):
    """A verified commit, the number of test images drawn with `seed`, and the checks."""

    commit: str
    images: int
    seed: int
    checks: dict[str, str]  # what, and whether it was verified


def verify(
    repository: Repository,
    revision: str | None = None,
    images: int | None = SAMPLE_SIZE,
    dataset: str | None = None,
    seed: int | None = None,
) -> Verification:
    """Check files, card, metrics and predictions; UserError that names the first failed check.

    Args:
        images: Size of the random sample to classify again; None for all test images, which also
            verifies the metrics that need probabilities.
        dataset: Another place of the same dataset, such as a local folder.
    """
    seed = secrets.randbelow(2**32) if seed is None else seed
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        commit = repository.request(repository.api.repo_info, revision=revision).sha
        try:
            with provenance.malformed("Its files are not those that this pipeline writes"):
                folder, unlisted = _download(repository, commit, cache)
                results = _check_files(folder, repository.name)
                info = results["dataset"]
                splits = provenance.load_evaluated_splits(
                    folder, results, dataset, *(["validation"] if images is None else [])
                )
                split = DecodedImages(splits[info["split"]])
                _check_metrics(results, split.labels)
                rows = np.random.default_rng(seed).permutation(len(split))[:images]
                rows.sort()  # in the dataset's order
                classifier = _load_classifier(folder, results)
                logits = torch.cat([*_classify(classifier, split, rows)])  # (n, C)
                _check_predictions(results, rows, logits)
                _check_examples(folder, split)
                if images is None:
                    _check_probabilities(
                        results, classifier, splits.get("validation"), split.labels, logits
                    )
        except UserError as error:
            raise UserError(
                f"Verification of {repository.name} @ {commit[:12]} failed. {error}"
            ) from None
    full = "verified" if images is None else "NOT verified; ARGS=--full verifies them"
    checks = {
        "checksums, list of files, card, recipe": "verified",
        "accuracy, F1, confusion matrix and class values": "verified, from the predictions",
        f"predictions of {len(rows):,} of {len(split):,} test images": f"verified (seed {seed})",
        "NLL, ECE, OOD threshold and rates": full,
        UNVERIFIED: "NOT verified: as the publisher says",
    }
    if unlisted:
        checks[f"files of others: {', '.join(unlisted)}"] = "NOT verified"
    return Verification(commit, len(rows), seed, checks)


def _download(repository: Repository, commit: str, cache: str) -> tuple[Path, list[str]]:
    """Download the published files; return their folder, and what else is in the repository."""
    paths = repository.files(commit).keys() - HUB_MANAGED_FILES
    if missing := sorted(
        {PUBLICATION, "README.md", *runs.MODEL_FILES, provenance.EVALUATION} - paths
    ):
        raise UserError(f"It has no {', '.join(missing)}.")
    listed = repository.read_publication(commit)["files"].keys() | {PUBLICATION}
    if missing := sorted(listed - paths):
        raise UserError(f"It has no {', '.join(missing)}, which it lists.")
    unlisted = sorted(paths - listed)
    if harmful := [path for path in unlisted if Path(path).suffix.lower() not in HARMLESS]:
        raise UserError(f"These files are not on the published list: {', '.join(harmful)}.")
    api, request = repository.api, repository.request
    others = [escape(path) for path in unlisted]
    options = {"revision": commit, "cache_dir": cache}
    folder = Path(request(api.snapshot_download, **options, ignore_patterns=others))
    checksums = request(api.verify_repo_checksums, **options)
    corrupt = {m["path"] for m in checksums.mismatches} | {*checksums.missing_paths} & listed
    if corrupt:
        raise UserError(f"The download of {', '.join(sorted(corrupt))} is corrupt.")
    return folder, unlisted


def _check_files(folder: Path, repo: str) -> dict:
    """Check that files, results and card belong together; return the results."""
    publication = runs.read_json(folder / PUBLICATION)
    results, faithfulness = staging.read_results(folder)
    recipe = folder / "recipe.yaml"
    if (recipe.read_text("utf-8") if recipe.exists() else None) != (
        staging.as_yaml(results["recipe"]) if results["recipe"] else None
    ):
        raise UserError("recipe.yaml is not the recipe of the results.")
    text = (folder / "README.md").read_bytes().decode()
    if lines := card.mismatches(text, card.render(results, repo, publication, faithfulness)):
        raise UserError("\n".join(["The card is not the one that its results give:", *lines]))
    if changed := runs.changed_files(publication["files"], folder):
        raise UserError(f"These files are not those that were published: {', '.join(changed)}.")
    return results


def _check_metrics(results: dict, labels: np.ndarray) -> None:
    """Compute all metrics again that follow from predictions and labels (N,): not nll and ece."""
    predictions, num_classes = np.asarray(results["predictions"]), len(results["labels"])
    if predictions.shape != labels.shape or not set(predictions) <= set(range(num_classes)):
        raise UserError("The results do not have one prediction for each image.")
    logits = np.eye(num_classes, dtype=np.float32)[predictions]  # (N, C)
    scores = ImageClassification(keep_in_memory=True).compute(predictions=logits, references=labels)
    for name in scores.keys() - TOLERANCE.keys():
        if not np.array_equal(np.round(results[name], 6), np.round(scores[name], 6)):
            raise UserError(f"The published {name} does not follow from the predictions.")


def _load_classifier(folder: Path, results: dict):
    try:
        classifier = pipeline("image-classification", model=str(folder), trust_remote_code=False)
    except (OSError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"The model can't be loaded: {' '.join(str(error).split())}") from None
    names = classifier.model.config.id2label
    if [names[i] for i in range(len(names))] != results["labels"]:
        raise UserError("The classes of the model are not those of its results, in their order.")
    return classifier


def _classify(classifier, split: DecodedImages, rows: np.ndarray) -> Iterator[torch.Tensor]:
    """Yield the logits (B, C) that `pipeline()` gives for the images of `rows` (n,)."""
    column = classifier.model.config.label2id
    for start in range(0, len(rows), BATCH):
        pixels = split.batch(rows[start : start + BATCH])["pixel_values"].permute(0, 2, 3, 1)
        images = [Image.fromarray(array) for array in pixels.numpy()]  # (H, W, 3)
        options = {"top_k": len(column), "batch_size": 64, "function_to_apply": "none"}
        logits = torch.empty(len(images), len(column))
        for i, answer in enumerate(classifier(images, **options)):
            for entry in answer:
                logits[i, column[entry["label"]]] = entry["score"]
        yield logits


def _check_predictions(results: dict, rows: np.ndarray, logits: torch.Tensor) -> None:
    """Compare the predictions and confidences of `rows` (n,) with their logits (n, C)."""
    probs = logits.softmax(dim=1)  # (n, C)
    published = torch.tensor(results["predictions"])[rows]  # (n,)
    best, confidences = probs.amax(dim=1), torch.tensor(results["confidences"])[rows]
    of_published = probs.gather(1, published[:, None]).squeeze(1)
    different = (of_published < best - TIE) | ((best - confidences).abs() > TOLERANCE["confidence"])
    if different.any():
        count = int(different.sum())
        raise UserError(f"{count} of {len(rows)} predictions are not the published ones.")


def _check_examples(folder: Path, split: DecodedImages) -> None:
    """Check that the card's example images are those test images."""
    for path, row in runs.read_json(folder / PUBLICATION)["examples"].items():
        pixels = split.batch([row])["pixel_values"][0].permute(1, 2, 0).numpy()  # (H, W, 3)
        with Image.open(folder / path) as image:
            example = np.asarray(image.resize(pixels.shape[1::-1]), float)
        if example.shape != pixels.shape or abs(example - pixels).mean() > EXAMPLE_TOLERANCE:
            raise UserError(f"{path} is not test image {row}.")


def _check_probabilities(
    results: dict, classifier, validation: Dataset, labels: np.ndarray, logits: torch.Tensor
) -> None:
    """Compute NLL, ECE, OOD threshold and rates again from the logits (N, C) of all images."""
    name, split, published = results["dataset"]["name"], results["dataset"]["split"], results["ood"]
    metric = ImageClassification(keep_in_memory=True)
    again = metric.compute(predictions=logits.numpy(), references=labels)
    processor, data = classifier.image_processor, DataArguments(dataset=name)
    pairs = {key: (results[key], again[key]) for key in ("nll", "ece")}
    if published:
        ood = measure_ood(classifier.model, processor, validation, logits, split, data)
        pairs["OOD threshold"] = published["threshold"], ood["threshold"]
        for group in ("pass_rate", "ood_datasets"):
            pairs |= {
                f"OOD rate of {key}": (published[group][key], ood[group][key]) for key in ood[group]
            }
    for key, (value, expected) in pairs.items():
        if not abs(value - expected) <= TOLERANCE[key.split()[0]]:
            raise UserError(f"The published {key}, {value:.4f}, is {expected:.4f} for this model.")
