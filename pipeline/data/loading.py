"""Load a dataset of labeled images, check it, and split it into train, validation and test."""

import os

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset
from PIL import Image

from pipeline.data import streaming
from pipeline.data.decoding import decode
from pipeline.errors import UserError
from pipeline.recipe import DataArguments
from pipeline.runs import hub_commit, is_local

SPLIT_SEED = 0  # the same validation images for every training seed, so that runs compare
TEST_SIZE = 0.2  # share of train that is the test split of a dataset without one


def load_splits(
    data: DataArguments, image_size: int, resample: int, *splits: str
) -> dict[str, Dataset]:
    """Load splits, decoded: columns `image` uint8 (3, H, W) and `label`.

    Args:
        data: Which dataset, and how it is split.
        image_size: Side of the model's input, in pixels: see `decoding.decode`.
        resample: Pillow's filter for images that are resized.
        splits: "train", "validation" or "test". A streamed dataset has no decoded train split.

    Raises:
        UserError: The dataset can't be loaded, has no image or label column, or holds images or
            labels that can't be used.
    """
    if data.streaming:
        raw = {split: _load_eval_split(data, split) for split in splits}
    else:
        raw = load_raw(data)
    return {split: decode(raw[split], image_size, resample, data.num_proc) for split in splits}


def load_split(data: DataArguments, split: str, image_size: int, resample: int) -> Dataset:
    """Load one split: see `load_splits`."""
    return load_splits(data, image_size, resample, split)[split]


def load_raw(data: DataArguments) -> DatasetDict:
    """Load train, validation and test, checked but undecoded.

    Returns:
        The splits with the columns `image`, `label` and `row`, the row in the published split.

    Raises:
        UserError: See `load_splits`.
    """
    published = _load_published(data)
    splits = {"train": published[data.train_split]}
    if data.test_split in published:
        splits["test"] = published[data.test_split]
    for name, split in splits.items():
        image, label = _find_columns(split, data)
        split = split.select_columns([image, label])
        new_names = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
        split = split.rename_columns(new_names)
        _check_labels(split, name)
        splits[name] = split.add_column("row", np.arange(len(split)))
    if "test" not in splits:
        splits |= split_off(splits["train"], "test", TEST_SIZE)
    return DatasetDict(splits | split_off(splits["train"], "validation", data.validation_size))


def split_off(dataset: Dataset, name: str, size: float) -> dict[str, Dataset]:
    """Split a share of each class off a train split; always the same rows.

    Args:
        dataset: Columns `image` and `label`.
        name: The new split, "validation" or "test".
        size: Its share of the images.

    Returns:
        The new split under its name, and what is left as "train".

    Raises:
        UserError: A class has too few images.
    """
    try:
        parts = dataset.train_test_split(size, stratify_by_column="label", seed=SPLIT_SEED)
    except ValueError as error:
        raise UserError(
            f"Cannot split {size:.0%} of the train split off for {name}: {error}"
        ) from None
    return {"train": parts["train"], name: parts["test"]}


def load_stream(data: DataArguments, split: str) -> streaming.LabeledStream:
    """Open the part of a streamed dataset that is its "train", "validation" or "test" split.

    Raises:
        UserError: See `load_splits`.
    """
    published = _load_published(data)
    has_test = data.test_split in published
    name = data.test_split if has_test and split == "test" else data.train_split
    if published[name].features is None:
        raise UserError(f'The dataset "{data.dataset}" does not say what its columns hold.')
    image, label = _find_columns(published[name], data)
    part = None if has_test and split == "test" else split
    test_size = 0.0 if has_test else TEST_SIZE
    return streaming.LabeledStream(
        published[name], image, label, part, data.validation_size, test_size
    )


def digits() -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 in 17 grays, as 32x32 RGB images."""
    from sklearn.datasets import load_digits  # takes a second: only the demo needs it

    source = load_digits()
    pixels = np.rint(source.images * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(p).resize((32, 32), Image.BICUBIC).convert("RGB") for p in pixels]
    names = ClassLabel(names=[str(name) for name in source.target_names])
    features = Features({"image": datasets.Image(), "label": names})
    return Dataset.from_dict({"image": images, "label": source.target.tolist()}, features=features)


def _load_published(data: DataArguments) -> dict[str, Dataset] | dict[str, IterableDataset]:
    """All splits as published; UserError for a split that the recipe names and it has not."""
    if data.dataset == "digits":
        source = digits()
        splits = {"train": source.to_iterable_dataset(num_shards=8) if data.streaming else source}
    else:
        splits = _load_from_folder_or_hub(data)
    named = [data.train_split]
    if data.test_split != DataArguments.test_split:
        named.append(data.test_split)
    if missing := [name for name in named if name not in splits]:
        raise UserError(
            f'The dataset "{data.dataset}" has no split "{missing[0]}"; it has '
            f"{', '.join(splits)}. Name one with --train_split or --test_split."
        )
    return splits


def _load_from_folder_or_hub(data: DataArguments):
    name = data.dataset
    if is_local(name):
        name = os.path.expanduser(name)
    else:
        hub_commit("dataset", name, data.dataset_revision)
    try:
        return datasets.load_dataset(
            name, data.dataset_config, revision=data.dataset_revision, streaming=data.streaming
        )
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f'Cannot load the dataset "{data.dataset}": {reason}') from None


def _load_eval_split(data: DataArguments, split: str) -> Dataset:
    stream = load_stream(data, split)
    images = stream.sample(streaming.VALIDATION_IMAGES) if split == "validation" else stream.store()
    if len(images) == 0:
        raise UserError(
            f'No image of the dataset "{data.dataset}" is left for the {split} split: raise '
            f"validation_size ({data.validation_size}), or publish a test split."
        )
    return images


def _find_columns(dataset: Dataset | IterableDataset, data: DataArguments) -> tuple[str, str]:
    """The image and the label column."""
    return (
        _find_column(dataset, datasets.Image, data.image_column, "image", data.dataset),
        _find_column(dataset, ClassLabel, data.label_column, "label", data.dataset),
    )


def _find_column(dataset, feature: type, name: str | None, role: str, source: str) -> str:
    """The column of that type, `name` if given; UserError unless there is exactly one."""
    candidates = [c for c, kind in dataset.features.items() if isinstance(kind, feature)]
    columns = ", ".join(f"{c} ({type(kind).__name__})" for c, kind in dataset.features.items())
    if name is not None and name not in candidates:
        raise UserError(
            f'"{name}" is not a column of type {feature.__name__} in "{source}"; it has {columns}.'
        )
    if not candidates:
        raise UserError(
            f'The dataset "{source}" has no {role} column (of type {feature.__name__}); it has '
            f"{columns}."
        )
    if name is None and len(candidates) > 1:
        raise UserError(
            f'The dataset "{source}" has {len(candidates)} {role} columns, '
            f"{', '.join(candidates)}: choose one with --{role}_column."
        )
    return name or candidates[0]


def _check_labels(dataset: Dataset, split: str) -> None:
    if len(dataset) == 0:
        raise UserError(f'The split "{split}" is empty.')
    labels = dataset.with_format("arrow")["label"][:].to_pandas().to_numpy(dtype=float)
    names = dataset.features["label"].names
    wrong = np.flatnonzero(np.isnan(labels) | (labels < 0) | (labels >= len(names)))
    if len(wrong):
        value = "missing" if np.isnan(labels[wrong[0]]) else int(labels[wrong[0]])
        raise UserError(
            f'In the split "{split}", {len(wrong)} labels are missing or outside 0 to '
            f"{len(names) - 1}; the first is in row {wrong[0]} ({value})."
        )
    if len(np.unique(labels)) == 1:
        raise UserError(
            f'All images in the split "{split}" are of one class, "{names[int(labels[0])]}": '
            "there is nothing to tell apart."
        )
