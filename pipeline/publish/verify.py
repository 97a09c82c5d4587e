"""Download a published model as a user would, and verify the statements in its card."""

import secrets
import tempfile
from glob import escape
from math import isclose
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from transformers import pipeline

from pipeline import runs
from pipeline.data.decoding import DecodedImages
from pipeline.data.transforms import input_size
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.metrics import ImageClassification
from pipeline.publish import card, onnx, provenance, staging
from pipeline.publish.hub import HUB_MANAGED_FILES, PUBLICATION, Repository
from pipeline.recipe import to_yaml

SAMPLE_SIZE = 1000  # images
TIE = 1e-3  # classes with a smaller difference in probability may swap
SWAPPED = 0.005  # the largest share of images whose class may be swapped so
CONFIDENCE = 0.01  # tolerance for rounding on other processors
# Absolute and relative tolerance of metrics that need all probabilities.
TOLERANCE = {"nll": 1e-3, "ece": 2e-3, "ood": 0.01, "calibration": 0.01}
# The scores of the OOD detector are compared instead; few images may change their bin.
NOT_COMPARED = {"gaussian", "bins"}
EXAMPLE_TOLERANCE = 16  # mean difference in gray levels, due to JPEG
REQUIRED = {PUBLICATION, "README.md", *runs.MODEL_FILES, provenance.EVALUATION}
# Extensions of unlisted files that nothing loads; a pickle, code or a config is an error.
HARMLESS = {"", ".md", ".txt", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".pdf", ".csv", ".onnx"}
UNVERIFIED = (
    "training (length, hardware, checkpoint) and its curves",
    "attention maps, robustness, near-duplicates",
    "other seeds, other OOD datasets, ONNX copies, license",
)


def verify(
    repository: Repository, revision: str | None = None, images: int | None = SAMPLE_SIZE,
    dataset: str | None = None, seed: int | None = None,
) -> tuple[str, dict[str, str]]:  # fmt: skip
    """Check files, card, metrics and predictions of a published model.

    Args:
        repository: The published model.
        revision: A branch, tag or commit; `main` by default.
        images: Size of the random sample to classify again; None for all test images, which also
            verifies the metrics that need probabilities.
        dataset: Another location of the same dataset, such as a local folder.
        seed: Seed for the sample; a new one by default.

    Returns:
        The verified commit, and whether each check was verified.

    Raises:
        UserError: A check failed; the message names it.
    """
    seed = secrets.randbelow(2**32) if seed is None else seed
    commit = repository.request(repository.api.repo_info, revision=revision).sha
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    damaged = provenance.malformed("Its files were not written by this pipeline")
    try:
        with folder as cache, damaged:
            folder, unlisted = _download(repository, commit, cache)
            results = _check_files(folder, repository.name)
            data = provenance.evaluated_data(folder, results, dataset)
            split = DecodedImages(provenance.load_evaluated_split(folder, results, data))
            _check_metrics(results, split.labels)
            rows = np.sort(np.random.default_rng(seed).permutation(len(split))[:images])
            classifier = _load_classifier(folder, results)
            _check_predictions(results, classifier, split, rows)
            _check_examples(folder, split)
            if images is None:
                again = evaluate(str(folder), data, results["dataset"]["split"])
                _compare("accuracy", results["accuracy"], again["accuracy"], SWAPPED)
                for key, tolerance in TOLERANCE.items():
                    _compare(key, results.get(key), again.get(key), tolerance)
    except UserError as error:
        name = f"{repository.name} @ {commit[:12]}"
        raise UserError(f"Verification of {name} failed. {error}") from None
    full = "verified" if images is None else "NOT verified; ARGS=--full verifies them"
    checks = {
        "checksums, list of files, card, recipe": "verified",
        "accuracy, F1, confusion matrix and class values": "verified, from the predictions",
        f"predictions of {len(rows):,} of {len(split):,} test images": f"verified (seed {seed})",
        "NLL, ECE, OOD detection, calibration": full,
    } | dict.fromkeys(UNVERIFIED, "NOT verified: as the publisher says")
    others = {f"other files: {', '.join(unlisted)}": "NOT verified"} if unlisted else {}
    return commit, checks | others


def _download(repository: Repository, commit: str, cache: str) -> tuple[Path, list[str]]:
    """Download the published files; return their folder and the repository's other files."""
    api, request, options = repository.api, repository.request, {"revision": commit}
    paths = {*request(api.list_repo_files, **options)} - HUB_MANAGED_FILES
    if missing := sorted(REQUIRED - paths):
        raise UserError(f"It has no {', '.join(missing)}.")
    listed = repository.read_publication(commit)["files"].keys() | {PUBLICATION}
    if missing := sorted(listed - paths):
        raise UserError(f"It lists {', '.join(missing)}, but does not have them.")
    unlisted = sorted(paths - listed)
    if harmful := [path for path in unlisted if Path(path).suffix.lower() not in HARMLESS]:
        raise UserError(f"These files are not on the published list: {', '.join(harmful)}.")
    options, others = options | {"cache_dir": cache}, [escape(path) for path in unlisted]
    folder = Path(request(api.snapshot_download, **options, ignore_patterns=others))
    checksums = request(api.verify_repo_checksums, **options)
    corrupt = {m["path"] for m in checksums.mismatches} | {*checksums.missing_paths} & listed
    if corrupt:
        raise UserError(f"The download of {', '.join(sorted(corrupt))} is corrupt.")
    return folder, unlisted


def _check_files(folder: Path, repo: str) -> dict:
    """Check that files, results and card match; return the results."""
    publication = runs.read_json(folder / PUBLICATION)
    results, faithfulness = staging.read_results(folder)
    recipe = folder / "recipe.yaml"
    text = recipe.read_text("utf-8") if recipe.exists() else None
    if text != (to_yaml(results["recipe"]) if results["recipe"] else None):
        raise UserError("recipe.yaml is not the recipe of the results.")
    text = (folder / "README.md").read_bytes().decode()
    if lines := card.mismatches(text, card.render(results, repo, publication, faithfulness)):
        reason, code = "The card is not the one rendered from its results", results["code_revision"]
        if code and code != runs.code_revision():
            reason += f" (if only its wording differs, verify it with the code at {code})"
        raise UserError("\n".join([f"{reason}:", *lines]))
    if publication.get("onnx") != runs.read_json(folder / onnx.REPORT):
        raise UserError(f"The card's ONNX copies are not those of {onnx.REPORT}.")
    if changed := runs.changed_files(publication["files"], folder):
        raise UserError(f"These files are not the published ones: {', '.join(changed)}.")
    return results


def _check_metrics(results: dict, labels: np.ndarray) -> None:
    """Recompute all metrics that depend only on predictions and labels (N,): not nll and ece."""
    predictions, num_classes = np.asarray(results["predictions"]), len(results["labels"])
    if results["dataset"]["images"] != len(labels):
        raise UserError(
            f"The results say {results['dataset']['images']} images, not {len(labels)}."
        )
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
        raise UserError("The classes of the model, or their order, are not those of its results.")
    count = sum(parameter.numel() for parameter in classifier.model.parameters())
    size = input_size(classifier.image_processor)
    if (count, size) != (results["model"]["parameters"], results["model"]["image_size"]):
        raise UserError("The model's size or image size is not that of its results.")
    return classifier


def _image(split: DecodedImages, row: int) -> Image.Image:
    return Image.fromarray(split.batch([row])["pixel_values"][0].permute(1, 2, 0).numpy())


def _check_predictions(results: dict, classifier, split: DecodedImages, rows: np.ndarray) -> None:
    """Compare predictions and confidences for `rows` (n,) with the output of `pipeline()`."""
    labels, wrong, swapped = results["labels"], 0, 0
    answers = classifier((_image(split, row) for row in rows), top_k=len(labels), batch_size=64)
    for row, answer in zip(rows, answers, strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        best, published = max(scores.values()), scores[labels[results["predictions"][row]]]
        # Written so that NaN is wrong.
        is_close = abs(best - results["confidences"][row]) <= CONFIDENCE
        wrong += not (published >= best - TIE and is_close)
        swapped += published != best
    if wrong or swapped > max(1, SWAPPED * len(rows)):
        count = max(wrong, swapped)
        raise UserError(f"{count} of {len(rows)} predictions are not the published ones.")


def _check_examples(folder: Path, split: DecodedImages) -> None:
    """Check that the card's example images are the test images that it names."""
    for path, row in runs.read_json(folder / PUBLICATION)["examples"].items():
        original = _image(split, row)
        with Image.open(folder / path) as image:
            example = np.asarray(image.convert("RGB"), float)
        original = np.asarray(original.resize(example.shape[1::-1]))
        if abs(example - original).mean() > EXAMPLE_TOLERANCE:
            raise UserError(f"{path} is not test image {row}.")


def _compare(name: str, published, again, tolerance: float) -> None:
    """Compare all numbers of two results, except those that only one of them has."""
    if again is None and published is not None:
        raise UserError(f"The published {name} can't be computed for this model.")
    if isinstance(again, dict) and published is not None:
        for key in again.keys() - NOT_COMPARED:
            _compare(f"{name} {key}", published[key], again[key], tolerance)
    elif isinstance(again, list) and published is not None:
        for i, values in enumerate(zip(published, again, strict=True)):
            _compare(f"{name} {i}", *values, tolerance)
    elif isinstance(again, float) and not isclose(
        published, again, rel_tol=tolerance, abs_tol=tolerance
    ):
        raise UserError(f"The published {name}, {published:.4f}, is {again:.4f} for this model.")
