"""Open a dataset as it is published: a Hub repository, a local folder, or scikit-learn's digits."""

import os
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset
from huggingface_hub import HfApi, constants, metadata_load
from PIL import Image

from pipeline.data import labels
from pipeline.data.folders import (
    READABLE,
    UNREADABLE,
    class_labels,
    is_image,
    list_files,
    load_files,
    load_folder,
)
from pipeline.data.splits import SPLIT_SEED, assign_roles
from pipeline.errors import UserError, shorten
from pipeline.recipe import DataArguments
from pipeline.runs import hub_commit, is_local

STREAM_SHARDS = 256  # of a folder of image files


@dataclass
class Source:
    """A dataset as it is published, with its splits by the part they play."""

    splits: dict[str, Dataset] | dict[str, IterableDataset]  # "train", "validation", "test"
    image: str  # the column of images
    label: str  # the column of labels
    names: list[str]  # the classes
    roles: dict[str, str]  # the published name of each split


def load_source(data: DataArguments, names: list[str] | None = None) -> Source:
    """Open a dataset, and find its splits, columns and classes. See `load_splits`."""
    if data.dataset == "digits":
        published = {"train": digits()}
    elif is_local(data.dataset):
        published = _load_local(Path(os.path.abspath(os.path.expanduser(data.dataset))), data)
    else:
        hub_commit("dataset", data.dataset, data.dataset_revision)
        published, used = _load_published(data.dataset, data)
        if any(Path(path).suffix.lower() in READABLE for path in used):
            _check_all_used(_list_hub_images(data), {_path_in_repository(p) for p in used}, data)
    roles = assign_roles(list(published), data)
    splits = {role: published[name] for role, name in roles.items()}
    first = splits.get("train", splits.get("test"))
    if first.features is None:
        raise UserError(f'The dataset "{data.dataset}" does not say what its columns hold.')
    image, label = labels.find_columns(first, data)
    names = names or labels.class_names(first, label)
    if data.streaming:
        splits = {role: _as_stream(split) for role, split in splits.items()}
    return Source(splits, image, label, names, roles)


def digits() -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 in 17 grays, as 32x32 RGB images."""
    from sklearn.datasets import load_digits  # takes a second: only the demo needs it

    source = load_digits()
    pixels = np.rint(source.images * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(p).resize((32, 32), Image.BICUBIC).convert("RGB") for p in pixels]
    names = ClassLabel(names=[str(name) for name in source.target_names])
    features = Features({"image": datasets.Image(), "label": names})
    return Dataset.from_dict({"image": images, "label": source.target.tolist()}, features=features)


def _load_local(root: Path, data: DataArguments) -> dict[str, Dataset] | dict[str, IterableDataset]:
    """A folder, by its README if that says how, otherwise by its files."""
    readme = root / "README.md"
    settings = (metadata_load(readme) or {}) if readme.is_file() else {}
    if {"configs", "dataset_info"} & settings.keys():
        published, used = _load_published(str(root), data)
        images = [str(root / path) for path in list_files(root) if is_image(root, path)]
        _check_all_used(images, used, data)
        return published
    if data.dataset_config is not None:
        raise UserError(f'"{root}" has no configurations: leave out --dataset_config.')
    if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(root))
        return saved if isinstance(saved, DatasetDict) else {"train": saved}
    return load_folder(root, data)


def _load_published(name: str, data: DataArguments):
    """All splits by the rules of `datasets`, and the files that they are read from."""
    try:
        builder = datasets.load_dataset_builder(
            name, data.dataset_config, revision=data.dataset_revision
        )
        files = {split: list(paths) for split, paths in (builder.config.data_files or {}).items()}
        for (first, paths), (second, others) in combinations(files.items(), 2):
            if both := sorted(set(paths) & set(others)):
                raise UserError(f"{shorten(both)} is in two splits, {first} and {second}.")
        if _numbers_differ(files):
            splits = load_files("parquet", files, data.streaming)
        elif data.streaming:
            splits = builder.as_streaming_dataset()
        else:
            builder.download_and_prepare()
            splits = builder.as_dataset()
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f'Cannot load the dataset "{data.dataset}": {reason}') from None
    return splits, {path for paths in files.values() for path in paths}


def _list_hub_images(data: DataArguments) -> list[str]:
    if constants.HF_HUB_OFFLINE:
        return []
    files = HfApi().list_repo_files(
        data.dataset, repo_type="dataset", revision=data.dataset_revision
    )
    return [path for path in files if Path(path).suffix.lower() in READABLE | UNREADABLE]


def _path_in_repository(url: str) -> str:
    """The path in `hf://datasets/owner/name@commit/path`."""
    return url.partition("@")[2].partition("/")[2]


def _check_all_used(images: list[str], used: set[str], data: DataArguments) -> None:
    """UserError for images that `datasets` drops beside others, unless a configuration is named."""
    places = {_place(path) for path in used}
    unused = [path for path in images if path not in used and _place(path) in places]
    if unused and data.dataset_config is None:
        raise UserError(
            f'"{data.dataset}" has {len(unused)} images that `datasets` does not load: '
            f"{shorten(unused)}. Correct data_files in its README.md, or load its files from a "
            "folder without README.md."
        )


def _numbers_differ(files: dict[str, list[str]]) -> bool:
    """Whether splits number their classes in different ways, which `datasets` does not see."""
    first = [paths[0] for paths in files.values()]
    if len(first) < 2 or not all(path.endswith(".parquet") for path in first):
        return False
    return any(class_labels(path) != class_labels(first[0]) for path in first[1:])


def _place(path: str) -> tuple:
    """The folder of an image's class folder; a figure of the README is elsewhere."""
    return Path(path).parts[:-2], len(Path(path).parts)


def _as_stream(split: Dataset | IterableDataset) -> IterableDataset:
    if isinstance(split, IterableDataset):
        return split
    # Image files lie class by class: mixed once, so that shards are too.
    mixed = split.shuffle(seed=SPLIT_SEED).flatten_indices()
    return mixed.to_iterable_dataset(num_shards=min(len(split), STREAM_SHARDS))
