"""Assign the roles train, validation and test to published splits; split missing ones off train."""

import re
from itertools import combinations
from pathlib import Path

import numpy as np
from datasets import Dataset

from pipeline.data.decoding import hash_files
from pipeline.errors import UserError, shorten
from pipeline.recipe import DataArguments
from pipeline.runs import print_once

SPLIT_SEED = 0  # the same validation images for every training seed, so that runs are comparable
TEST_SIZE = 0.2  # share of train that becomes the test split where there is none
SYNONYMS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
SPLIT_WORDS = {word: split for split, words in SYNONYMS.items() for word in words}


def assign_roles(names: list[str], data: DataArguments) -> dict[str, str]:
    """Return which published split serves as "train", "validation" and "test".

    The default names in `data` match case-insensitively, and match their synonyms. A published
    validation split picks the checkpoint. Without a test split, it serves as the test split, unless
    `validation_split` names it. Missing roles are left out: they are split off train later.
    """
    roles = {}
    for role in SYNONYMS:
        wanted = getattr(data, f"{role}_split")
        found = [name for name in names if SPLIT_WORDS.get(name.lower()) == role]
        if role == "validation":
            found = [name for name in found if name not in roles.values()]
        found = [wanted] if wanted in names else found
        if len(found) > 1 or wanted not in (None, role, *names):
            problem = f"{len(found)} {role} splits" if len(found) > 1 else f'no split "{wanted}"'
            raise UserError(
                f'The dataset "{data.dataset}" has {problem}; it has {", ".join(names)}. Name one '
                f"with --{role}_split."
            )
        if found:
            roles[role] = found[0]
    if not roles:
        raise UserError(
            f'The dataset "{data.dataset}" has no split "{data.train_split}"; it has '
            f"{', '.join(names)}. Name one with --train_split or --test_split."
        )
    if len(set(roles.values())) < len(roles):
        pairs = ", ".join(f'{role} is "{name}"' for role, name in roles.items())
        raise UserError(
            f"The splits must differ ({pairs}): set --train_split, --validation_split and "
            "--test_split to different ones."
        )
    if "test" not in roles and "validation" in roles and data.validation_split is None:
        roles["test"] = roles.pop("validation")
    return roles


def split_word(path: Path) -> str | None:
    """Return the split named in a file's path, if any; UserError if there are several."""
    words = re.split(r"[/._-]", str(path).lower())
    splits = sorted({SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS})
    if len(splits) > 1:
        raise UserError(f'The path "{path}" names several splits ({", ".join(splits)}): rename it.')
    return splits[0] if splits else None


def split_off(dataset: Dataset, name: str, size: float) -> dict[str, Dataset]:
    """Split a share of each class off a train split, always the same rows.

    Args:
        dataset: Columns `image` and `label`.
        name: The new split, "validation" or "test".
        size: Its share of the images.

    Returns:
        The new split under its name, and the rest as "train", with at least one image per class.
    """
    try:
        parts = dataset.train_test_split(size, stratify_by_column="label", seed=SPLIT_SEED)
        return {"train": parts["train"], name: parts["test"]}
    except ValueError:  # scikit-learn needs two images of each class, one for each part
        labels = class_numbers(dataset)
    rows = choose_rows(labels, max(1, round(size * len(labels))))
    if len(rows) == 0:
        raise UserError(
            f"Cannot split {size:.0%} of the train split off for {name}: no class has two images. "
            f"Add images or a {name} split."
        )
    if len(classes := np.setdiff1d(labels, labels[rows])):
        names = shorten([f'"{dataset.features["label"].names[c]}"' for c in classes])
        print_once(f"Classes with too few images for the {name} split, all kept in train: {names}.")
    return {"train": _drop(dataset, rows), name: dataset.select(rows)}


def limit(dataset: Dataset, count: int) -> Dataset:
    """Return `count` images of a train split, with the same share of each class."""
    labels = class_numbers(dataset)
    if count < (classes := len(np.unique(labels))):
        raise UserError(
            f"max_train_samples is {count}, but there are {classes} classes: set it to at least "
            "one image per class."
        )
    return dataset.select(sample_rows(labels, count))


def sample_rows(labels: np.ndarray, count: int) -> np.ndarray:
    """Choose `count` rows at random, the same share of each class and at least one (or all rows).

    Takes class numbers, int (N,), and returns sorted row numbers.
    """
    return np.setdiff1d(np.arange(len(labels)), choose_rows(labels, len(labels) - count))


def choose_rows(labels: np.ndarray, count: int) -> np.ndarray:
    """Choose at most `count` rows at random, the same share of each class but never a whole class.

    Takes class numbers, int (N,), and returns sorted row numbers, int (count,).
    """
    generator = np.random.default_rng(SPLIT_SEED)
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, shuffled within each
    sizes, classes = np.bincount(labels), labels[order]
    rank = np.arange(len(labels)) - (np.cumsum(sizes) - sizes)[classes]  # within its class
    position = (rank + generator.random(len(sizes))[classes]) / sizes[classes]
    is_free = rank < sizes[classes] - 1
    chosen = order[is_free][np.argsort(position[is_free], kind="stable")]
    return np.sort(chosen[: max(0, count)])


def class_numbers(dataset: Dataset) -> np.ndarray:
    """Return the `label` column, int64 (N,)."""
    return np.asarray(dataset.with_format("numpy")["label"][:])


def warn_of_duplicates(splits: dict[str, Dataset]) -> None:
    """Print a warning with the number of image files that are identical in two splits."""
    hashes = {name: hash_files(split) for name, split in splits.items()}
    for first, second in combinations(hashes, 2):
        if count := int(np.isin(hashes[second], hashes[first]).sum()):
            print_once(
                f"Warning: {count:,} images of the {second} split are also in {first}, so the "
                f"accuracy on {second} will be too high. Remove them from one split."
            )


def _drop(dataset: Dataset, rows: np.ndarray) -> Dataset:
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), rows))
