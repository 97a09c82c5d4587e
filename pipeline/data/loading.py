"""Load a dataset of labeled images, check it, and return its train, validation and test splits.

Each function takes either the arguments for opening a dataset, or one opened by `load_source`.
"""

import hashlib

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict

from pipeline.data.decoding import decode, hash_files
from pipeline.data.labels import MISSING, encode
from pipeline.data.sources import Source, load_source
from pipeline.data.splits import TEST_SIZE, class_numbers, limit, split_off, warn_of_duplicates
from pipeline.data.streaming import load_stream, store_stream
from pipeline.errors import UserError
from pipeline.recipe import DataArguments
from pipeline.runs import print_once

ROLES = ("train", "validation", "test")


def load_splits(
    data: DataArguments | Source, processor, *splits: str, names: list[str] | None = None
) -> dict[str, Dataset]:
    """Load decoded splits, with columns `image`, uint8 (3, H, W), and `label`.

    Args:
        data: The dataset and how it is split.
        processor: The model's image processor, see `decoding.decode`.
        splits: "train", "validation" or "test". A streamed dataset has no decoded train split.
        names: The class names in the model's order, by default those of the train split.

    Returns:
        The splits by name, without validation if the dataset has only a test split.

    Raises:
        UserError: The dataset can't be loaded, has no image or label column, or contains images or
            labels that can't be used.
    """
    source = load_source(data, names)
    data, roles = source.data, {role: "split off train" for role in ROLES}
    roles |= {role: repr(name) for role, name in source.roles.items()}
    listed = ", ".join(f"{role} is {name}" for role, name in roles.items())
    print_once(f'Splits of "{data.dataset}": {listed}.')
    if "train" not in source.splits:
        splits = [split for split in splits if split != "validation"]
    if data.streaming:
        raw = {split: store_stream(load_stream(source, split), split) for split in splits}
    else:
        raw = load_raw(source)
        if "train" in splits:
            warn_of_duplicates(raw)
    for split in splits:
        _check_labels(raw, split, data.dataset)
    options = {"num_proc": data.num_proc, "skip_corrupt": data.skip_corrupt}
    return {split: decode(raw[split], processor, **options) for split in splits}


def load_split(
    data: DataArguments | Source, split: str, processor, names: list[str] | None = None
) -> Dataset:
    """Load one decoded split, see `load_splits`."""
    return load_splits(data, processor, split, names=names)[split]


def load_raw(data: DataArguments | Source) -> DatasetDict:
    """Load train, validation and test, undecoded; unpublished splits are split off train.

    Their columns are `image`, `label` and `row`, the row number in the published split.
    """
    source, splits = load_source(data), {}
    if source.data.streaming:
        raise UserError(
            f'"{source.data.dataset}" is streamed, so its images can\'t be listed: use files, or a '
            "model that was trained without --streaming."
        )
    for role, split in source.splits.items():
        if source.image not in split.column_names:
            raise UserError(
                f'The split "{source.roles[role]}" of "{source.data.dataset}" has no column '
                f'"{source.image}", only {", ".join(split.column_names)}: rename one.'
            )
        codes = np.full(len(split), MISSING)
        if source.label in split.column_names:
            values, kind = split.with_format("arrow")[source.label][:], split.features[source.label]
            codes = encode(values, kind, source.names, source.roles[role])
        # The image column itself may be called `label`.
        split = split.select_columns(source.image).rename_columns({source.image: "image"})
        split = split.add_column("label", codes, feature=ClassLabel(names=source.names))
        splits[role] = split.add_column("row", np.arange(len(split)))
    if "train" in splits:
        _check_labels(splits, "train", source.data.dataset)
        for name, size in (("test", TEST_SIZE), ("validation", source.data.validation_size)):
            if name not in splits:
                splits |= split_off(splits["train"], name, size)
        if source.data.max_train_samples is not None:
            splits["train"] = limit(splits["train"], source.data.max_train_samples)
    return DatasetDict({role: splits[role] for role in ROLES if role in splits})


def fingerprint(data: DataArguments | Source) -> str:
    """Return a SHA-256 of the classes and of each split's image files and labels, in order.

    Every file is read the first time; later calls use the cache. For a stream it covers only the
    classes, since new images don't move the others to another split.
    """
    source = load_source(data)
    digest = hashlib.sha256(repr(source.names).encode())
    for name, split in {} if source.data.streaming else sorted(load_raw(source).items()):
        digest.update(name.encode() + hash_files(split).tobytes() + class_numbers(split).tobytes())
    return digest.hexdigest()


def _check_labels(splits: dict[str, Dataset], split: str, source: str) -> None:
    if split not in splits:
        raise UserError(f'The dataset "{source}" has no {split} split: set --{split}_split.')
    dataset, name = splits[split], f'The split "{split}" of "{source}"'
    if len(dataset) == 0:
        raise UserError(f"{name} is empty: raise validation_size, or add a {split} split.")
    codes, names = class_numbers(dataset), dataset.features["label"].names
    missing = np.flatnonzero(codes == MISSING)
    if len(missing):
        raise UserError(
            f"{name} has no labels from 0 to {len(names) - 1} for {len(missing)} of {len(codes)} "
            f"images, first in row {dataset[int(missing[0])]['row']}: add them, or choose another "
            f"split with --{split}_split."
        )
    if split == "train" and len(np.unique(codes)) == 1:
        raise UserError(
            f'{name} has images of one class only, "{names[codes[0]]}": add images of at least one '
            "other class."
        )
