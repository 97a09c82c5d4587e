"""Load a dataset of labeled images, check it, and give its splits: train, validation and test."""

import hashlib

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict

from pipeline.data import labels, streaming
from pipeline.data.decoding import decode, hash_files
from pipeline.data.sources import Source, load_source
from pipeline.data.splits import TEST_SIZE, complete, warn_of_duplicates
from pipeline.errors import UserError
from pipeline.recipe import DataArguments
from pipeline.runs import print_once

ROLES = ("train", "validation", "test")


def load_splits(
    data: DataArguments,
    image_size: int,
    resample: int,
    *splits: str,
    names: list[str] | None = None,
    crop: bool = False,
) -> dict[str, Dataset]:
    """Load splits, decoded: columns `image` uint8 (3, H, W) and `label`.

    Args:
        data: Which dataset, and how it is split.
        image_size: Side of the model's input, in pixels: see `decoding.decode`.
        resample: Pillow's filter for images that are resized.
        splits: "train", "validation" or "test". A streamed dataset has no decoded train split.
        names: The classes in a model's order; by default those of the train split.
        crop: Crop the center of images that are resized.

    Returns:
        The splits by name. Of a dataset that has a test split only, validation is left out.

    Raises:
        UserError: The dataset can't be loaded, has no image or label column, or holds images or
            labels that can't be used.
    """
    source = load_source(data, names)
    parts = [
        f"{role} is {'split off train' if role not in source.roles else repr(source.roles[role])}"
        for role in ROLES
    ]
    print_once(f'Splits of "{data.dataset}": {", ".join(parts)}.')
    if "train" not in source.splits:
        splits = [split for split in splits if split != "validation"]
    if data.streaming:
        raw = {split: _load_eval_split(source, data, split) for split in splits}
    else:
        raw = _convert(source, data)
        if "train" in splits:
            warn_of_duplicates(raw)
    for split in splits:
        _check_labels(raw.get(split), split, data.dataset)
    return {
        split: decode(raw[split], image_size, resample, data.num_proc, data.skip_corrupt, crop)
        for split in splits
    }


def load_split(
    data: DataArguments,
    split: str,
    image_size: int,
    resample: int,
    names: list[str] | None = None,
    crop: bool = False,
) -> Dataset:
    """Load one split: see `load_splits`."""
    return load_splits(data, image_size, resample, split, names=names, crop=crop)[split]


def load_raw(data: DataArguments) -> DatasetDict:
    """Load train, validation and test, undecoded.

    Returns:
        The splits with the columns `image`, `label` and `row`, the row in the published split.

    Raises:
        UserError: See `load_splits`.
    """
    return _convert(load_source(data), data)


def fingerprint(data: DataArguments) -> str:
    """Return a SHA-256 of the classes and of each split's image files and labels, in order.

    Every file is read the first time; after that the cache knows. Of a stream, whose images keep
    their split whatever else is added, it covers the classes only.
    """
    source = load_source(data)
    digest = hashlib.sha256(repr(source.names).encode())
    for name, split in {} if data.streaming else sorted(_convert(source, data).items()):
        digest.update(name.encode() + hash_files(split).tobytes() + _labels(split).tobytes())
    return digest.hexdigest()


def load_stream(data: DataArguments, split: str) -> streaming.LabeledStream:
    """Open the part of a streamed dataset that is its "train", "validation" or "test" split.

    Raises:
        UserError: See `load_splits`.
    """
    if data.max_train_samples is not None and split == "train":
        raise UserError("A stream has no fixed number of images: leave out max_train_samples.")
    return _open_stream(load_source(data), data, split)


def _open_stream(source: Source, data: DataArguments, split: str) -> streaming.LabeledStream:
    is_published = split in source.splits
    if not is_published and "train" not in source.splits:
        raise UserError(f'The dataset "{data.dataset}" has no split to {split} on.')
    sizes = {"validation": data.validation_size, "test": TEST_SIZE}
    sizes = {role: 0.0 if role in source.splits else size for role, size in sizes.items()}
    part = split if any(sizes.values()) and (split == "train" or not is_published) else None
    name = split if is_published else "train"
    if source.label not in source.splits[name].features:
        raise UserError(f'The split "{source.roles[name]}" has no labels: name another one.')
    return streaming.LabeledStream(
        source.splits[name], source.roles[name], source.image, source.label, source.names, part,
        sizes["validation"], sizes["test"], data.skip_corrupt,
    )  # fmt: skip


def _load_eval_split(source: Source, data: DataArguments, split: str) -> Dataset:
    stream = _open_stream(source, data, split)
    images = stream.sample(streaming.VALIDATION_IMAGES) if split == "validation" else stream.store()
    if len(images) == 0:
        raise UserError(
            f'No image of the dataset "{data.dataset}" is left for the {split} split: raise '
            f"validation_size ({data.validation_size}), or publish a test split."
        )
    return images


def _convert(source: Source, data: DataArguments) -> DatasetDict:
    """The splits with the columns `image`, `label` and `row`, and with what is split off train."""
    splits = {}
    for role, split in source.splits.items():
        if source.image not in split.column_names:
            raise UserError(
                f'The split "{source.roles[role]}" of "{data.dataset}" has no column '
                f'"{source.image}"; it has {", ".join(split.column_names)}.'
            )
        codes = np.full(len(split), labels.MISSING)
        if source.label in split.column_names:
            values = split.with_format("arrow")[source.label][:]
            kind = split.features[source.label]
            codes = labels.encode(values, kind, source.names, source.roles[role])
        split = split.select_columns([source.image])
        if source.image != "image":
            split = split.rename_column(source.image, "image")
        split = split.add_column("label", codes, feature=ClassLabel(names=source.names))
        splits[role] = split.add_column("row", np.arange(len(split)))
    if "train" in splits:
        _check_labels(splits["train"], "train", data.dataset)
    return complete(splits, data)


def _check_labels(dataset: Dataset | None, split: str, source: str) -> None:
    if dataset is None:
        raise UserError(f'The dataset "{source}" has no split to {split} on.')
    if len(dataset) == 0:
        raise UserError(f'The split "{split}" is empty.')
    codes, names = _labels(dataset), dataset.features["label"].names
    missing = np.flatnonzero(codes == labels.MISSING)
    if len(missing) == len(codes):
        raise UserError(
            f'The split "{split}" of "{source}" has no labels, so it is no use here: name another '
            f"split with --{split}_split."
        )
    if len(missing):
        raise UserError(
            f'In the split "{split}", {len(missing)} labels are missing or outside 0 to '
            f"{len(names) - 1}; the first is in row {dataset[int(missing[0])]['row']}."
        )
    if split == "train" and len(np.unique(codes)) == 1:
        raise UserError(
            f'All images in the split "{split}" are of one class, "{names[codes[0]]}": '
            "there is nothing to tell apart."
        )


def _labels(dataset: Dataset) -> np.ndarray:
    return np.asarray(dataset.with_format("numpy")["label"][:])
