"""Say which published split is train, validation and test, and split off train what is missing."""

from itertools import combinations

import numpy as np
from datasets import Dataset, DatasetDict

from pipeline.data.decoding import hash_files
from pipeline.data.tables import SPLIT_WORDS
from pipeline.errors import UserError, shorten
from pipeline.recipe import DataArguments
from pipeline.runs import print_once

SPLIT_SEED = 0  # the same validation images for every training seed, so that runs compare
TEST_SIZE = 0.2  # share of train that is the test split of a dataset without one


def assign_roles(names: list[str], data: DataArguments) -> dict[str, str]:
    """Return which published split serves as "train", "validation" and "test".

    A published validation split picks the checkpoint. Where there is no test split, it is the test
    split, unless `validation_split` names it. What is missing is to be split off train.

    Args:
        names: The published splits.
        data: The splits it names. A default matches in any case, and by its synonyms.

    Raises:
        UserError: A split that is named does not exist, or is named twice.
    """
    roles, listed = {}, ", ".join(names)
    for role in ("train", "test", "validation"):
        wanted = getattr(data, f"{role}_split")
        synonyms = [name for name in names if SPLIT_WORDS.get(name.lower()) == role]
        if wanted in names:
            roles[role] = wanted
        elif wanted not in (None, role):
            raise UserError(
                f'The dataset "{data.dataset}" has no split "{wanted}"; it has {listed}. Name one '
                f"with --{role}_split."
            )
        elif len(synonyms) > 1:
            raise UserError(
                f'The dataset "{data.dataset}" has {len(synonyms)} {role} splits, '
                f"{', '.join(synonyms)}: choose one with --{role}_split."
            )
        elif synonyms and not (role == "validation" and synonyms[0] in roles.values()):
            roles[role] = synonyms[0]
    if len(set(roles.values())) < len(roles):
        pairs = ", ".join(f'{role} is "{name}"' for role, name in roles.items())
        raise UserError(
            f"The splits must differ ({pairs}): set --train_split, --validation_split and "
            "--test_split to different ones."
        )
    if "test" not in roles and "validation" in roles and data.validation_split is None:
        roles["test"] = roles.pop("validation")
    if not roles:
        raise UserError(
            f'The dataset "{data.dataset}" has no split "{data.train_split}"; it has {listed}. '
            "Name one with --train_split or --test_split."
        )
    return roles


def complete(splits: dict[str, Dataset], data: DataArguments) -> DatasetDict:
    """Split off train what is missing, and shorten train to `max_train_samples`.

    Args:
        splits: "train" and what is published of "validation" and "test", with the columns `image`
            and `label`. Without train, they stay as they are.
        data: The sizes.

    Raises:
        UserError: There are too few images.
    """
    if "train" in splits:
        for name, size in (("test", TEST_SIZE), ("validation", data.validation_size)):
            if name not in splits:
                splits = splits | split_off(splits["train"], name, size)
        if data.max_train_samples is not None:
            splits = splits | {"train": _limit(splits["train"], data.max_train_samples)}
    return DatasetDict(splits)


def split_off(dataset: Dataset, name: str, size: float) -> dict[str, Dataset]:
    """Split a share of each class off a train split; always the same rows.

    Args:
        dataset: Columns `image` and `label`.
        name: The new split, "validation" or "test".
        size: Its share of the images.

    Returns:
        The new split under its name, and what is left as "train", with at least one image of each
        class.

    Raises:
        UserError: No class has two images.
    """
    try:
        parts = dataset.train_test_split(size, stratify_by_column="label", seed=SPLIT_SEED)
        return {"train": parts["train"], name: parts["test"]}
    except ValueError:  # scikit-learn wants two images of each class, and one in each part
        pass
    labels = np.asarray(dataset.with_format("numpy")["label"][:])
    rows = choose_rows(labels, max(1, round(size * len(labels))))
    if len(rows) == 0:
        raise UserError(
            f"Cannot split {size:.0%} of the train split off for {name}: no class has two images. "
            f"Add images, or a {name} split."
        )
    classes = np.setdiff1d(labels, labels[rows])
    if len(classes):
        names = shorten([f'"{dataset.features["label"].names[c]}"' for c in classes])
        print_once(f"Too few images for the {name} split, all in train, of the classes {names}.")
    return {"train": dataset.select(np.setdiff1d(np.arange(len(labels)), rows)),
            name: dataset.select(rows)}  # fmt: skip


def choose_rows(labels: np.ndarray, count: int) -> np.ndarray:
    """Choose rows at random, the same share of each class, but never all rows of a class.

    Args:
        labels: Class numbers, int (N,).
        count: How many; fewer are chosen where one row of each class would not be left.

    Returns:
        Rows in order, int (count,).
    """
    generator = np.random.default_rng(SPLIT_SEED)
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, shuffled in each
    sizes = np.bincount(labels)
    rank = np.arange(len(labels)) - (np.cumsum(sizes) - sizes)[labels[order]]  # in its class
    position = (rank + generator.random(len(sizes))[labels[order]]) / sizes[labels[order]]
    is_free = rank < sizes[labels[order]] - 1
    return np.sort(order[is_free][np.argsort(position[is_free], kind="stable")[:count]])


def warn_of_duplicates(splits: dict[str, Dataset]) -> None:
    """Print how many image files are the same in two splits."""
    names = [name for name in ("train", "validation", "test") if name in splits]
    hashes = {name: hash_files(splits[name]) for name in names}
    for first, second in combinations(hashes, 2):
        count = int(np.isin(hashes[second], hashes[first]).sum())
        if count:
            print_once(
                f"Warning: {count:,} images of the {second} split are also in {first}: its "
                "accuracy will be too high. Remove them from one."
            )


def _limit(dataset: Dataset, count: int) -> Dataset:
    labels = np.asarray(dataset.with_format("numpy")["label"][:])
    classes = len(np.unique(labels))
    if count < classes:
        raise UserError(
            f"max_train_samples is {count}, and there are {classes} classes: give at least one "
            "image to each."
        )
    left_out = choose_rows(labels, max(0, len(labels) - count))
    return dataset.select(np.setdiff1d(np.arange(len(labels)), left_out))
