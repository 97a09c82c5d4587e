"""Load, check and split a dataset of labelled images, and decode each image once to uint8.

Decoded images lie in the `datasets` cache as uint8 (3, H, W), memory-mapped: CIFAR-10 takes
0.2 GB, where float pixels at 224 px would take 36 GB.
"""

import hashlib
import io
import os
import shutil
from contextlib import suppress
from functools import partial

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features
from datasets.fingerprint import Hasher
from PIL import Image, ImageOps

from pipeline.errors import UserError
from pipeline.recipe import DataArguments
from pipeline.revision import hub_commit, is_local

SPLIT_SEED = 0  # the same validation images for every training seed, so that runs compare
TEST_SIZE = 0.2  # carved from train where a dataset has no test split


def load_splits(
    data: DataArguments, image_size: int, resample: int, only: str | None = None
) -> DatasetDict:
    """Train, validation and test (or `only` one), decoded: `image` uint8 (3, H, W), `label`.

    H and W are the images' own where all share one size of at most `image_size`, else
    `image_size`, resized by Pillow's filter `resample`. Raises UserError for a dataset that
    can't be loaded, has no image or label column, or holds images or labels that can't be used.
    A streamed dataset has no train here: see `streaming`.
    """
    if data.streaming:
        from pipeline.streaming import held_out  # which stands on this module

        parts = [s for s in ("validation", "test") if only in (None, s)]
        return DatasetDict({s: held_out(data, s, image_size, resample) for s in parts})
    raw = load_raw(data)
    source = "test" if only == "test" and "test" in raw else None
    splits = {
        s: decode(raw[s], s, image_size, resample, data.num_proc)
        for s in raw
        if source in (None, s)
    }
    # Carved after decoding, so that the cache serves every split, and rows keep their numbers.
    if "test" not in splits:
        splits |= carve(splits["train"], "test", TEST_SIZE)
    if "train" in splits:
        splits |= carve(splits["train"], "validation", data.validation_size)
    return DatasetDict({s: d for s, d in splits.items() if only in (None, s)})


def load_raw(data: DataArguments) -> DatasetDict:
    """Train, and test if there is one, as published: columns `image` and `label`, checked."""
    raw = DatasetDict({"train": digits()}) if data.dataset == "digits" else load_published(data)
    if data.train_split not in raw:
        raise UserError(
            f'The dataset "{data.dataset}" has no split "{data.train_split}"; it has '
            f"{', '.join(raw)}. Name one with --train_split."
        )
    splits = {"train": raw[data.train_split]}
    if data.test_split in raw:
        splits["test"] = raw[data.test_split]
    elif data.test_split != DataArguments.test_split:
        raise UserError(
            f'The dataset "{data.dataset}" has no split "{data.test_split}"; it has '
            f"{', '.join(raw)}."
        )
    splits = {s: _two_columns(d, data) for s, d in splits.items()}
    for split, dataset in splits.items():
        _check_labels(dataset, split)
    return DatasetDict(splits)


def decode(
    dataset: Dataset, split: str, image_size: int, resample: int, num_proc: int | None = None
) -> Dataset:
    """Decode each image once to uint8 (3, H, W), in the cache; see `load_splits`."""
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    width, height = open_image(dataset[0]["image"], split, 0).size
    if max(width, height) <= image_size:
        with suppress(_MixedSizes):
            return _decode_to((height, width), dataset, split, resample, num_proc, exact=True)
    return _decode_to((image_size, image_size), dataset, split, resample, num_proc, exact=False)


def open_image(cell: dict | None, split: str, row: int) -> Image.Image:
    """One cell of an undecoded image column as an upright RGB image; UserError names the row."""
    try:
        source = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]
        return ImageOps.exif_transpose(Image.open(source)).convert("RGB")
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise UserError(
            f'The image in split "{split}", row {row}, cannot be decoded ({error}); '
            "remove or replace it."
        ) from None


class Batches(torch.utils.data.Dataset):
    """A decoded split for a DataLoader, read a batch at a time.

    `__getitems__` gives {"pixel_values": uint8 (B, 3, H, W), "labels": int64 (B,)}; the
    loader's collator has nothing left to do. The rows are copied out of the memory-mapped
    Arrow file, seen through numpy: 0.5 µs a row, where `dataset[rows]` takes 50.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.shape = dataset.features["image"].shape
        self.images = [_flat(c).reshape(-1, *self.shape) for c in _chunks(dataset, "image")]
        self.labels = [chunk.to_numpy() for chunk in _chunks(dataset, "label")]
        sizes = [len(labels) for labels in self.labels]
        self.starts = np.cumsum([0, *sizes[:-1]])  # the first row of each chunk
        # What `select` and the splits leave of the file's rows, in their order.
        chosen = dataset._indices
        self.chosen = None if chosen is None else chosen.column(0).to_numpy().astype(int)

    def __reduce__(self):
        return Batches, (self.dataset,)  # a worker maps the file anew, and is sent no copy of it

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        rows = np.asarray(rows) if self.chosen is None else self.chosen[rows]
        chunks = np.searchsorted(self.starts, rows, side="right") - 1
        places = rows - self.starts[chunks]
        images = np.empty((len(rows), *self.shape), np.uint8)
        labels = np.empty(len(rows), np.int64)
        for i, (chunk, place) in enumerate(zip(chunks, places, strict=True)):
            images[i] = self.images[chunk][place]
            labels[i] = self.labels[chunk][place]
        return {"pixel_values": torch.from_numpy(images), "labels": torch.from_numpy(labels)}

    @staticmethod
    def collate(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return batch


def _chunks(dataset: Dataset, column: str) -> list[pa.Array]:
    return dataset.data.column(column).chunks


def _flat(images: pa.ExtensionArray) -> np.ndarray:
    """The pixels of an Array3D column's chunk, (N * 3 * H * W,), not copied."""
    return images.storage.flatten().flatten().flatten().to_numpy()  # lists of rows of pixels


def content_hash(dataset: Dataset) -> str:
    """SHA-256 over the decoded images and labels: the same for any copy of the same data."""
    digest = hashlib.sha256()
    batches = Batches(dataset)
    for start in range(0, len(batches), 1000):
        batch = batches.__getitems__(list(range(start, min(start + 1000, len(batches)))))
        digest.update(batch["pixel_values"].numpy().tobytes())
        digest.update(batch["labels"].numpy().tobytes())
    return digest.hexdigest()


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 in 17 greys, as 32x32 RGB images."""
    from sklearn.datasets import load_digits

    source = load_digits()
    pixels = np.rint(source.images * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(p).resize((32, 32), Image.BICUBIC).convert("RGB") for p in pixels]
    names = ClassLabel(names=[str(n) for n in source.target_names])
    features = Features({"image": datasets.Image(), "label": names})
    return Dataset.from_dict({"image": images, "label": source.target.tolist()}, features=features)


class _MixedSizes(Exception):
    pass


def load_published(data: DataArguments, streaming: bool = False) -> dict[str, Dataset]:
    """All splits as published, or `datasets.IterableDataset`s of them; UserError if there are none.

    Of a dataset on the Hub or in a folder.
    """
    name = data.dataset
    if is_local(name):
        name = os.path.expanduser(name)
    else:
        hub_commit("dataset", name, data.dataset_revision)
    try:
        return datasets.load_dataset(
            name, data.dataset_config, revision=data.dataset_revision, streaming=streaming
        )
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f'Cannot load the dataset "{data.dataset}": {reason}') from None


def _two_columns(dataset: Dataset, data: DataArguments) -> Dataset:
    image = column(dataset, datasets.Image, data.image_column, "image", data.dataset)
    label = column(dataset, ClassLabel, data.label_column, "label", data.dataset)
    dataset = dataset.select_columns([image, label])
    return dataset.rename_columns(
        {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    )


def column(dataset: Dataset, kind: type, name: str | None, role: str, source: str) -> str:
    """The column of that kind, `name` if given; UserError where there is none, or no telling."""
    found = [c for c, feature in dataset.features.items() if isinstance(feature, kind)]
    columns = ", ".join(f"{c} ({type(f).__name__})" for c, f in dataset.features.items())
    if name is not None:
        if name in found:
            return name
        raise UserError(
            f'"{name}" is no column of type {kind.__name__} in "{source}"; it has {columns}.'
        )
    if not found:
        raise UserError(
            f'The dataset "{source}" has no {role} column (of type {kind.__name__}); it has '
            f"{columns}."
        )
    if len(found) > 1:
        raise UserError(
            f'The dataset "{source}" has {len(found)} {role} columns, {", ".join(found)}: '
            f"choose one with --{role}_column."
        )
    return found[0]


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


def carve(dataset: Dataset, name: str, size: float) -> dict[str, Dataset]:
    """`name`, that share of a training split by class, and train, the rest; always the same rows.

    UserError where a class has too few images.
    """
    try:
        parts = dataset.train_test_split(size, stratify_by_column="label", seed=SPLIT_SEED)
    except ValueError as error:
        raise UserError(
            f'Cannot carve a {name} split of {size:.0%} from "train": {error}'
        ) from None
    return {"train": parts["train"], name: parts["test"]}


def _decode_to(
    shape: tuple[int, int],
    dataset: Dataset,
    split: str,
    resample: int,
    num_proc: int | None,
    exact: bool,
) -> Dataset:
    """Images of another shape raise _MixedSizes if `exact`, else they are resized."""
    features = Features(
        {"image": Array3D((3, *shape), "uint8"), "label": dataset.features["label"]}
    )
    fingerprint = Hasher.hash((dataset._fingerprint, shape, resample, exact, "1"))
    if not any(_cache_holds(file["filename"], fingerprint) for file in dataset.cache_files):
        _check_room(len(dataset) * 3 * shape[0] * shape[1], dataset)
    if num_proc is None:
        # A process takes a second to start: worth it from some 10,000 images.
        num_proc = min(os.cpu_count() or 1, 1 + len(dataset) // 10_000)
    return dataset.map(
        partial(_decode_batch, split=split, shape=shape, resample=resample, exact=exact),
        batched=True,
        with_indices=True,
        features=features,
        num_proc=num_proc if num_proc > 1 else None,
        new_fingerprint=fingerprint,
        desc=f"Decoding {split}",
    )


def _decode_batch(
    batch: dict, rows: list[int], split: str, shape: tuple[int, int], resample: int, exact: bool
) -> dict:
    images = np.empty((len(rows), 3, *shape), np.uint8)
    height, width = shape
    for i, (cell, row) in enumerate(zip(batch["image"], rows, strict=True)):
        image = open_image(cell, split, row)
        if image.size != (width, height):
            if exact:
                raise _MixedSizes
            image = image.resize((width, height), resample)
        images[i] = np.asarray(image).transpose(2, 0, 1)  # (H, W, 3) to (3, H, W)
    return {"image": images, "label": batch["label"]}


def _cache_holds(file: str, fingerprint: str) -> bool:
    folder = os.path.dirname(file)
    return any(name.startswith(f"cache-{fingerprint}") for name in os.listdir(folder))


def _check_room(size: int, dataset: Dataset) -> None:
    if not dataset.cache_files:
        return  # kept in memory
    folder = os.path.dirname(dataset.cache_files[0]["filename"])
    free = shutil.disk_usage(folder).free
    needed = int(size * 1.2)  # Arrow's offsets
    if free < needed:
        raise UserError(
            f"The decoded images need {needed / 1e9:.1f} GB in {folder}, and {free / 1e9:.1f} GB "
            "are free: make room, or name another disk with HF_DATASETS_CACHE."
        )
