"""Open a dataset: a Hub repository, a local folder, or scikit-learn's digits."""

import glob
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset
from huggingface_hub import HfFileSystem, metadata_load
from PIL import Image

from pipeline.data.folders import ARCHIVES, IMAGES, TABLES, is_image, list_files, load_images
from pipeline.data.labels import class_names, find_columns
from pipeline.data.splits import SPLIT_SEED, assign_roles, split_word
from pipeline.errors import UserError, shorten
from pipeline.recipe import DataArguments
from pipeline.runs import hub_commit, is_local

DATA_FILES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
STREAM_SHARDS = 256  # when a folder of image files is streamed


@dataclass
class Source:
    """An opened dataset, with its published splits by role."""

    data: DataArguments  # how it was opened
    splits: dict[str, Dataset] | dict[str, IterableDataset]  # "train", "validation", "test"
    image: str  # the image column
    label: str  # the label column
    names: list[str]  # class names
    roles: dict[str, str]  # role to published split name

    def origin(self, role: str) -> dict:
        """Return the published split that a role's images are from, and if they are only a part."""
        is_part = role not in self.roles  # split off train
        name = self.roles["train" if is_part else role]
        return {"published_split": name, "is_part": is_part}


def load_source(data: DataArguments | Source, names: list[str] | None = None) -> Source:
    """Open a dataset and find its splits, columns and classes; an open one is not reopened.

    The classes are `names`, by default those of the train split. Raises as `load_splits` does.
    """
    if isinstance(data, Source):
        return replace(data, names=names or data.names)
    if data.dataset == "digits":
        published = {"train": digits()}
    elif is_local(data.dataset):
        published = _load_folder(Path(os.path.abspath(os.path.expanduser(data.dataset))), data)
    else:
        hub_commit("dataset", data.dataset, data.dataset_revision)
        published = _load_published(data.dataset, data)
    roles = assign_roles(list(published), data)
    splits = {role: published[name] for role, name in roles.items()}
    first = splits.get("train", splits.get("test"))
    if first.features is None:
        raise UserError(f'"{data.dataset}" lacks column types: declare features in its README.md.')
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


def _load_folder(root: Path, data: DataArguments) -> dict:
    """Return the splits of a folder, as its README defines them, or otherwise by its files."""
    readme, settings = root / "README.md", {}
    if readme.is_file():
        try:
            settings = metadata_load(readme) or {}
        except (ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"Cannot read the header of {readme}: {reason}") from None
    if {"configs", "dataset_info"} & settings.keys():
        return _load_published(str(root), data)
    if data.dataset_config is not None:
        raise UserError(f'"{root}" has no configurations: remove --dataset_config.')
    if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(root)).with_format(None)
        return saved if isinstance(saved, DatasetDict) else {"train": saved}
    files, splits, kinds = list_files(root), defaultdict(list), set()
    images = [path for path in files if is_image(root, path)]
    packed = ARCHIVES if images else ARCHIVES - DATA_FILES.keys()
    if archives := [path for path in files if path.suffix.lower() in packed]:
        raise UserError(f'"{root}" holds archives ({shorten(archives)}): unpack and delete them.')
    if images:
        tables = [path for path in files if path.suffix.lower() in TABLES]
        return load_images(root, images, tables, data.label_column)
    for path in files:
        if kind := DATA_FILES.get(path.suffix.lower()):
            splits[split_word(path)].append(str(root / path))
            kinds.add(kind)
    if len(kinds) != 1:
        raise UserError(
            f'"{root}" holds {"several file types" if kinds else "no images"}: it should contain '
            "images, or files of one type (parquet, arrow or tar)."
        )
    if None in splits and len(splits) > 1:
        raise UserError(
            f"The file names {shorten(splits[None])} do not say which split they belong to: prefix "
            "them with train-, validation- or test-."
        )
    splits = {split or "train": paths for split, paths in splits.items()}
    with _explained(data.dataset):
        return _load_files(kinds.pop(), splits, data.streaming)


def _load_published(name: str, data: DataArguments) -> dict:
    """Load all splits as `datasets` does."""
    with _explained(data.dataset):
        builder = datasets.load_dataset_builder(
            name, data.dataset_config, revision=data.dataset_revision
        )
        files = {split: list(paths) for split, paths in (builder.config.data_files or {}).items()}
        for (one, paths), (other, more) in combinations(files.items(), 2):
            if both := sorted(set(paths) & set(more)):
                raise UserError(f"{shorten(both)} is in two splits, {one} and {other}: keep one.")
        if data.dataset_config is None:
            _check_all_used(name, files)
        # A remote file's footer takes a request: compare only the first of each split.
        compared = [paths[:1] if "://" in paths[0] else paths for paths in files.values()]
        parquet = [path for paths in compared for path in paths if path.endswith(".parquet")]
        stored = [_stored_names(path) for path in parquet]
        if _numbers_differ(stored):  # `datasets` does not notice
            return _load_files("parquet", files, data.streaming)
        declared = _class_names(builder.info.features or {})
        for column, names in (stored[0] if stored else {}).items():
            given = declared.get(column, names)  # it may rename classes, but not reorder them
            if any(name in given and given.index(name) != i for i, name in enumerate(names)):
                raise UserError(
                    f'The README of "{data.dataset}" and {parquet[0]} number the classes of the '
                    f'column "{column}" differently: correct one.'
                )
        if data.streaming:
            return builder.as_streaming_dataset()
        builder.download_and_prepare()
        return builder.as_dataset()


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        raise UserError(f'Cannot load the dataset "{name}": {reason}') from None


def _load_files(kind: str, files: dict[str, list[str]], streaming: bool) -> dict:
    """Load data files of one type, split by split, since splits may number classes differently."""
    splits = {}
    for split, paths in files.items():
        is_local = "://" not in paths[0]  # a remote footer takes a request each
        is_compared = is_local and kind in ("parquet", "arrow")
        if is_compared and _numbers_differ([*map(_stored_names, paths)]):
            raise UserError(
                f'The files of the split "{split}" number their classes differently: '
                f"{shorten(paths)}. Write them with the same ClassLabel."
            )
        files = {split: [glob.escape(path) for path in paths]}
        splits[split] = datasets.load_dataset(
            kind, data_files=files, split=split, streaming=streaming
        )
    return splits


def _numbers_differ(stored: list[dict[str, list[str]]]) -> bool:
    """Return whether files, each with the result of `_stored_names`, number classes differently."""
    return any(names != stored[0] for names in stored)


def _stored_names(path: str) -> dict[str, list[str]]:
    """Return the class names that a parquet or Arrow file stores, by column."""
    with fsspec.open(path, "rb") as file:
        if path.lower().endswith(".parquet"):
            schema = pq.read_schema(file)
        else:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            schema = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file).schema
    return _class_names(Features.from_arrow_schema(schema))


def _class_names(features: Features) -> dict[str, list[str]]:
    return {name: kind.names for name, kind in features.items() if isinstance(kind, ClassLabel)}


def _check_all_used(name: str, files: dict[str, list[str]]) -> None:
    """Raise UserError if `datasets` skips images that are next to those it loads."""

    def place(path: str) -> tuple:  # the class folder's; the README's figures are elsewhere
        return Path(path).parts[:-2], len(Path(path).parts)

    used = {path for paths in files.values() for path in paths}
    places = {place(path) for path in used if Path(path).suffix.lower() in IMAGES}
    if not places:
        return
    if Path(name).is_dir():
        listed = [f"{name}/{path}" for path in list_files(Path(name)) if is_image(Path(name), path)]
    else:  # the URL of each file begins with hf://datasets/OWNER/NAME@COMMIT
        listed = HfFileSystem().find("/".join(min(used).split("/")[:5]))
        listed = [f"hf://{path}" for path in listed if Path(path).suffix.lower() in IMAGES]
    unused = [path for path in listed if path not in used and place(path) in places]
    if unused:
        raise UserError(
            f'"{name}" has {len(unused)} images that `datasets` does not load: {shorten(unused)}. '
            "Correct data_files in its README.md, or load a copy of the folder without README.md."
        )


def _as_stream(split: Dataset | IterableDataset) -> IterableDataset:
    if isinstance(split, IterableDataset):
        return split
    # Image files are sorted by class: shuffle them once, so that each shard has all classes.
    mixed = split.shuffle(seed=SPLIT_SEED).flatten_indices()
    return mixed.to_iterable_dataset(num_shards=min(len(split), STREAM_SHARDS))
