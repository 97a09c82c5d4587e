"""Decode each image once to uint8 (3, H, W), and read decoded images back in batches.

Decoded images lie in the `datasets` cache, memory-mapped: CIFAR-10 takes 0.2 GB, where float pixels
at 224 px would take 36 GB.
"""

import hashlib
import io
import os
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import torch
from datasets import Array3D, Dataset, Features
from PIL import Image, ImageOps

from pipeline.data.transforms import fit_image
from pipeline.errors import UserError
from pipeline.runs import print_once

VERSION = 2  # part of the cache's key: raise it when the decoded pixels change
HASH_BATCH = 1000  # images
READ_BATCH = 100  # image files


def open_image(source: bytes | str | Path, name: str) -> Image.Image:
    """Open an image, upright and in RGB. 16-bit gray is scaled; 32-bit gray is refused.

    Args:
        source: The file's content, or its path (also one that fsspec knows, as `hf://...`).
        name: What an error calls the image.

    Raises:
        UserError: The image can't be read.
    """
    try:
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        elif "://" in str(source):
            source = io.BytesIO(read_file(source))
        file = Image.open(source)
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I;16") or (image.mode == "I" and file.format == "PPM"):
            # By the type's range, as Pillow does for 16-bit colors; gray it would clip.
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError("32-bit gray values have no fixed range: convert it to 8 or 16 bits")
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} cannot be decoded ({error}); remove or replace it.") from None


def open_cell(cell: dict | None, name: str) -> Image.Image:
    """Open a cell {"bytes", "path"} of an undecoded image column: see `open_image`."""
    cell = cell or {"bytes": b"", "path": None}
    path = f" ({cell['path']})" if cell["path"] else ""
    return open_image(cell["path"] if cell["bytes"] is None else cell["bytes"], name + path)


def read_file(path: str) -> bytes:
    """Read a file at a local path or one that fsspec knows."""
    with fsspec.open(path, "rb") as file:
        return file.read()


def hash_file(content: bytes) -> int:
    """Return a 64-bit hash of a file's content."""
    # Not a CRC: those inside a PNG cancel its pixels out.
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def hash_files(dataset: Dataset) -> np.ndarray:
    """Return `hash_file` of each image, uint64 (N,); read once, and kept in the cache."""
    files = dataset.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    hashes = files.map(
        _hash_batch, batched=True, batch_size=READ_BATCH, remove_columns=["image"],
        features=Features({"hash": datasets.Value("uint64")}), desc="Hashing image files",
    )  # fmt: skip
    return hashes.with_format("arrow")["hash"][:].to_numpy()  # "numpy" would make them signed


def decode(
    dataset: Dataset,
    image_size: int,
    resample: int,
    num_proc: int | None = None,
    skip_corrupt: bool = False,
    crop: bool = False,
) -> Dataset:
    """Decode each image once to uint8 (3, H, W), in the cache.

    Args:
        dataset: Columns `image`, `label`, and `row`, the image's row in the published split.
        image_size: Side of the model's input, in pixels. Images keep their own size where all
            share one of at most `image_size`; otherwise they are resized to a square of it.
        resample: Pillow's filter for that.
        num_proc: Processes; by default one for 10,000 images, and at most one per core.
        skip_corrupt: Leave out images that can't be decoded, and print which.
        crop: Crop the center of the resized image, see `transforms.resize`.

    Raises:
        UserError: An image can't be decoded, or the disk is too small.
    """
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    width, height = _first_size(dataset, skip_corrupt)
    decode_to = partial(_decode_to, dataset, resample, crop, num_proc, skip_corrupt)
    decoded = None
    if max(width, height) <= image_size:
        with suppress(_MixedSizes):
            decoded = decode_to((height, width), exact=True)
    if decoded is None:
        decoded = decode_to((image_size, image_size), exact=False)
    if len(decoded) < len(dataset):
        corrupt = np.flatnonzero(~np.isin(_rows(dataset), _rows(decoded)))
        names = [f"{row['row']} ({row['image']['path']})" for row in dataset.select(corrupt)]
        print_once(
            f'Left out {len(corrupt)} corrupt images of the split "{dataset.split or "train"}", '
            f"in the rows {', '.join(names)}."
        )
    return decoded.remove_columns("row")


class DecodedImages(torch.utils.data.Dataset):
    """A decoded split for a DataLoader, read a batch at a time.

    Rows are copied out of the memory-mapped Arrow file, seen through numpy: 0.5 µs a row, where
    `dataset[rows]` takes 50 to 200.
    """

    def __init__(self, dataset: Dataset):
        # `datasets` has no public way to ask whether rows were selected or shuffled.
        if dataset._indices is not None:
            dataset = dataset.flatten_indices()
        self.dataset = dataset
        self.shape = dataset.features["image"].shape  # (3, H, W)
        chunks = dataset.data.column("image").chunks
        self.images = [_flatten(chunk).reshape(-1, *self.shape) for chunk in chunks]
        self.labels = dataset.data.column("label").to_numpy()
        self.starts = np.cumsum([0, *map(len, chunks[:-1])])  # the first row of each chunk

    def __reduce__(self):
        return DecodedImages, (self.dataset,)  # a worker maps the file anew, and is sent no copy

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Return {"pixel_values": uint8 (B, 3, H, W), "labels": int64 (B,)} of these rows."""
        rows = np.asarray(rows, dtype=np.int64)
        chunks = np.searchsorted(self.starts, rows, side="right") - 1
        images = np.empty((len(rows), *self.shape), np.uint8)
        for i, (chunk, row) in enumerate(zip(chunks, rows - self.starts[chunks], strict=True)):
            images[i] = self.images[chunk][row]
        labels = torch.from_numpy(self.labels[rows].astype(np.int64))
        return {"pixel_values": torch.from_numpy(images), "labels": labels}

    __getitems__ = batch  # what a DataLoader calls

    @staticmethod
    def collate(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Leave a batch as it is: the DataLoader has nothing left to do."""
        return batch


def content_hash(dataset: Dataset) -> str:
    """Return the SHA-256 over decoded images and labels, the same for any copy of the same data."""
    digest = hashlib.sha256()
    images = DecodedImages(dataset)
    for start in range(0, len(images), HASH_BATCH):
        batch = images.batch(range(start, min(start + HASH_BATCH, len(images))))
        digest.update(batch["pixel_values"].numpy().tobytes())
        digest.update(batch["labels"].numpy().tobytes())
    return digest.hexdigest()


class _MixedSizes(Exception):
    pass


def _first_size(dataset: Dataset, skip_corrupt: bool) -> tuple[int, int]:
    """Width and height of the first image that can be decoded."""
    for row in dataset:
        with suppress(*[UserError] if skip_corrupt else []):
            return open_cell(row["image"], _name(dataset.split, row["row"])).size
    raise UserError(f'No image of the split "{dataset.split or "train"}" can be decoded.')


def _decode_to(
    dataset: Dataset,
    resample: int,
    crop: bool,
    num_proc: int | None,
    skip_corrupt: bool,
    shape: tuple[int, int],
    exact: bool,
) -> Dataset:
    """Images of another shape raise _MixedSizes if `exact`; otherwise they are resized."""
    features = Features(dataset.features | {"image": Array3D((3, *shape), "uint8")})
    cache = os.path.dirname(dataset.cache_files[0]["filename"]) if dataset.cache_files else None
    size = int(1.2 * len(dataset) * 3 * shape[0] * shape[1])  # bytes, with Arrow's offsets
    if num_proc is None:
        # A process takes a second to start: worth it from some 10,000 images.
        num_proc = min(os.cpu_count() or 1, 1 + len(dataset) // 10_000)
    return dataset.map(
        partial(
            _decode_batch, split=dataset.split, shape=shape, fit=(resample, crop), exact=exact,
            skip_corrupt=skip_corrupt, room=cache and (cache, size), version=VERSION,
        ),
        batched=True,
        with_indices=True,
        features=features,
        num_proc=num_proc if num_proc > 1 else None,
        desc="Decoding images",
    )  # fmt: skip


def _decode_batch(
    batch: dict, indices: list[int], split, shape, fit, exact, skip_corrupt, room, version
) -> dict:
    if room and indices[0] == 0:  # here, so that nothing is asked where the cache has it already
        _check_room(*room)
    height, width = shape
    images, decoded = np.empty((len(indices), 3, height, width), np.uint8), []
    for i, (cell, row) in enumerate(zip(batch["image"], batch["row"], strict=True)):
        try:
            image = open_cell(cell, _name(split, row))
        except UserError:
            if skip_corrupt:
                continue
            raise
        if image.size != (width, height):
            if exact:
                raise _MixedSizes
            image = fit_image(image, width, *fit)
        images[len(decoded)] = np.asarray(image).transpose(2, 0, 1)  # (H, W, 3) to (3, H, W)
        decoded.append(i)
    columns = {name: [batch[name][i] for i in decoded] for name in ("label", "row")}
    return {"image": images[: len(decoded)], **columns}


def _hash_batch(batch: dict) -> dict:
    cells = [cell or {"bytes": b""} for cell in batch["image"]]
    files = [read_file(c["path"]) if c["bytes"] is None else c["bytes"] for c in cells]
    return {"hash": np.array([hash_file(file) for file in files], np.uint64)}


def _rows(dataset: Dataset) -> np.ndarray:
    return dataset.with_format("numpy")["row"][:]


def _name(split: str | None, row: int) -> str:
    return f'The image in row {row} of the split "{split or "train"}"'


def _flatten(images: pa.ExtensionArray) -> np.ndarray:
    """The pixels of an Array3D column's chunk, (N * 3 * H * W,), not copied."""
    return images.storage.flatten().flatten().flatten().to_numpy()  # lists of rows of pixels


def _check_room(folder: str, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"The decoded images need {needed / 1e9:.1f} GB in {folder}, and {free / 1e9:.1f} GB "
            "are free: make room, or name another disk with HF_DATASETS_CACHE."
        )
