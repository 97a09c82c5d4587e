"""Download a published model as a stranger would, and measure whether it keeps its claims."""

import json
import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub import HfApi
from PIL import Image
from transformers import pipeline

from pipeline import card, hub
from pipeline.data import content_hash, load_splits
from pipeline.errors import UserError
from pipeline.evaluation import data_of

IMAGES = 1000


@dataclass
class Verified:
    """A revision that holds what it claims: `right` of `images` test images, as at evaluation."""

    commit: str
    files: int
    images: int
    right: int


def verify(
    api: HfApi,
    repo: str,
    revision: str | None = None,
    images: int | None = IMAGES,
    dataset: str | None = None,
) -> Verified:
    """Download a revision into an empty cache, compare checksums, card and results, and classify.

    `images` test images (None: all), spread evenly over the split, go through
    `transformers.pipeline`; as many must be right as at evaluation. `dataset` names the same
    data elsewhere, as in a local folder. UserError that says what differs.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        with hub.in_words(api, repo):
            commit = hub.retry(api.model_info, repo, revision=revision).sha
            folder = Path(hub.retry(api.snapshot_download, repo, revision=commit, cache_dir=cache))
            checked = hub.retry(api.verify_repo_checksums, repo, revision=commit, cache_dir=cache)
        wrong = [m["path"] for m in checked.mismatches] + list(checked.missing_paths)
        _expect(not wrong, repo, commit, f"the download of {', '.join(wrong)} is corrupt")
        results = _read_results(folder, repo, commit)
        changed = hub.changed_files(results["model"]["sha256"], folder)
        _expect(not changed, repo, commit, f"{', '.join(changed)} is not what was evaluated")
        maps = folder / "attention_faithfulness.json"
        faithfulness = json.loads(maps.read_text()) if maps.exists() else None
        said = card.differences((folder / "README.md").read_text(), results, faithfulness)
        _expect(not said, repo, commit, "; ".join(said[:3]))
        split = _images_of(folder, results, dataset)
        _expect(
            content_hash(split) == results["dataset"]["sha256"],
            repo, commit, "the test images are not those it was evaluated on",
        )  # fmt: skip
        truth = np.asarray(split["label"][:])
        predictions = np.asarray(results["predictions"])
        _check_sums(results, truth, predictions, repo, commit)
        chosen = np.unique(np.linspace(0, len(truth) - 1, images or len(truth)).astype(int))
        found = _classify(api, repo, commit, cache, split.select(chosen), results["labels"])
    right, expected = (int((p == truth[chosen]).sum()) for p in (found, predictions[chosen]))
    _expect(
        right == expected,
        repo, commit,
        f"of {len(chosen)} test images the download gets {right} right, "
        f"at evaluation it was {expected}",
    )  # fmt: skip
    return Verified(commit, checked.checked_count, len(chosen), right)


def _expect(holds: bool, repo: str, commit: str, otherwise: str) -> None:
    if not holds:
        raise UserError(f"Verification of {repo} @ {commit[:12]} failed: {otherwise}.")


def _read_results(folder: Path, repo: str, commit: str) -> dict:
    for name in ("README.md", *hub.MODEL_FILES, "evaluation_results.json"):
        _expect((folder / name).exists(), repo, commit, f"it has no {name}")
    return json.loads((folder / "evaluation_results.json").read_text())


def _images_of(folder: Path, results: dict, dataset: str | None) -> datasets.Dataset:
    """The split that was scored, decoded as it was then: `image` uint8 (3, H, W), `label`."""
    about = results["dataset"]
    data = data_of(str(folder), dataset or about["name"])
    if dataset is None:
        data = replace(data, dataset_config=about["config"], dataset_revision=about["revision"])
    resample = json.loads((folder / "preprocessor_config.json").read_text())["resample"]
    return load_splits(data, results["model"]["image_size"], resample, only=about["split"])[
        about["split"]
    ]


def _check_sums(results: dict, truth, predictions, repo: str, commit: str) -> None:
    """The published figures against the published predictions and the dataset's labels (N,)."""
    same_length = len(predictions) == len(truth) == results["dataset"]["images"]
    _expect(same_length, repo, commit, "the results have not one prediction for each image")
    matrix = np.zeros_like(np.asarray(results["confusion_matrix"]))
    np.add.at(matrix, (truth, predictions), 1)
    _expect(
        matrix.tolist() == results["confusion_matrix"]
        and np.isclose(results["accuracy"], np.trace(matrix) / len(truth), atol=1e-9),
        repo, commit, "the accuracy is not that of the predictions",
    )  # fmt: skip


def _classify(api: HfApi, repo: str, commit: str, cache: str, split, labels: list[str]):
    """Predicted classes (N,) by `pipeline()`, from the cache whose bytes were checked."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with hub.in_words(api, repo):
        classify = hub.retry(
            pipeline,
            "image-classification",
            model=repo,
            revision=commit,
            token=api.token,
            model_kwargs={"cache_dir": cache},
        )
    # (3, H, W) to (H, W, 3), for Pillow
    pictures = [Image.fromarray(np.moveaxis(np.asarray(i, np.uint8), 0, 2)) for i in split["image"]]
    answers = classify(pictures, top_k=1, batch_size=64)
    return np.asarray([labels.index(answer[0]["label"]) for answer in answers])
