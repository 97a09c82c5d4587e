"""Open a dataset as it is published: a Hub repository, a local folder, or scikit-learn's digits."""

import os
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset
from huggingface_hub import metadata_load
from PIL import Image

from pipeline.data.folders import check_all_used, load_files, load_folder, numbers_differ
from pipeline.data.labels import class_names, find_columns
from pipeline.data.splits import SPLIT_SEED, assign_roles
from pipeline.errors import UserError, shorten
from pipeline.recipe import DataArguments
from pipeline.runs import hub_commit, is_local

STREAM_SHARDS = 256  # of a folder of image files


@dataclass
class Source:
    """An opened dataset, with its published splits by the part they play."""

    data: DataArguments  # how it was opened
    splits: dict[str, Dataset] | dict[str, IterableDataset]  # "train", "validation", "test"
    image: str  # the column of images
    label: str  # the column of labels
    names: list[str]  # the classes
    roles: dict[str, str]  # the published name of each split


def load_source(data: DataArguments | Source, names: list[str] | None = None) -> Source:
    """Open a dataset, and find its splits, columns and classes; one that is open stays so.

    Its classes are `names`, by default those of the train split. UserError as `load_splits`.
    """
    if isinstance(data, Source):
        return replace(data, names=names or data.names)
    if data.dataset == "digits":
        published = {"train": digits()}
    elif is_local(data.dataset):
        published = _load_local(Path(os.path.abspath(os.path.expanduser(data.dataset))), data)
    else:
        hub_commit("dataset", data.dataset, data.dataset_revision)
        published = _load_published(data.dataset, data)
    roles = assign_roles(list(published), data)
    splits = {role: published[name] for role, name in roles.items()}
    first = splits.get("train", splits.get("test"))
    if first.features is None:
        raise UserError(f'The dataset "{data.dataset}" does not say what its columns hold.')
    image, label = find_columns(first, data)
    names = names or class_names(first, label)
    if data.streaming:
        splits = {role: _as_stream(split) for role, split in splits.items()}
    return Source(data, splits, image, label, names, roles)


def digits() -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 in 17 grays, as 32x32 RGB images."""
    from sklearn.datasets import load_digits  # takes a second: only the demo needs it

    source = load_digits()
    pixels = np.rint(source.images * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(p).resize((32, 32), Image.BICUBIC).convert("RGB") for p in pixels]
    names = ClassLabel(names=[str(name) for name in source.target_names])
    features = Features({"image": datasets.Image(), "label": names})
    return Dataset.from_dict({"image": images, "label": source.target.tolist()}, features=features)


def _load_local(root: Path, data: DataArguments) -> dict:
    """A folder, by its README if that says how, otherwise by its files."""
    readme = root / "README.md"
    settings = (metadata_load(readme) or {}) if readme.is_file() else {}
    if {"configs", "dataset_info"} & settings.keys():
        return _load_published(str(root), data)
    if data.dataset_config is not None:
        raise UserError(f'"{root}" has no configurations: leave out --dataset_config.')
    if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(root))
        return saved if isinstance(saved, DatasetDict) else {"train": saved}
    return load_folder(root, data)


def _load_published(name: str, data: DataArguments) -> dict:
    """All splits by the rules of `datasets`."""
    try:
        builder = datasets.load_dataset_builder(
            name, data.dataset_config, revision=data.dataset_revision
        )
        files = {split: list(paths) for split, paths in (builder.config.data_files or {}).items()}
        for (one, paths), (other, more) in combinations(files.items(), 2):
            if both := sorted(set(paths) & set(more)):
                raise UserError(f"{shorten(both)} is in two splits, {one} and {other}.")
        if data.dataset_config is None:
            check_all_used(name, files)
        first = [paths[0] for paths in files.values() if paths[0].endswith(".parquet")]
        if len(first) > 1 and numbers_differ(first):  # which `datasets` does not see
            return load_files("parquet", files, data.streaming)
        if data.streaming:
            return builder.as_streaming_dataset()
        builder.download_and_prepare()
        return builder.as_dataset()
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        raise UserError(f'Cannot load the dataset "{data.dataset}": {reason}') from None


def _as_stream(split: Dataset | IterableDataset) -> IterableDataset:
    if isinstance(split, IterableDataset):
        return split
    # Image files lie class by class: mixed once, so that shards are too.
    mixed = split.shuffle(seed=SPLIT_SEED).flatten_indices()
    return mixed.to_iterable_dataset(num_shards=min(len(split), STREAM_SHARDS))
