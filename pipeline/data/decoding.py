"""Decode each image once to uint8 (3, H, W), and read decoded images back in batches.

Decoded images are stored in the `datasets` cache and memory-mapped: CIFAR-10 takes 0.2 GB, compared
with 36 GB for float pixels at 224 px.
"""

import hashlib
import io
import os
import shutil
import struct
from contextlib import suppress

import datasets
import fsspec
import numpy as np
import torch
from datasets import Array3D, Dataset, Features
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.data.transforms import fit_image, resize_options
from pipeline.errors import UserError
from pipeline.runs import print_once

# What Pillow raises for a damaged image: the last two for some EXIF tags and AVIF.
DAMAGE = (
    OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError, struct.error,
    RuntimeError,
)  # fmt: skip
VERSION = 2  # part of the cache key: increment it when the decoded pixels change
BATCH = 100  # undecoded images held in memory
HASH_BATCH = 1000  # decoded images

Image.preinit()  # Pillow tries formats in import order, so import the common ones first


def open_image(source: bytes | str | os.PathLike | dict | None, name: str) -> Image.Image:
    """Open an image, upright and in RGB. 16-bit gray is scaled; 32-bit gray is an error.

    Args:
        source: As in `read_image`.
        name: The image's name in error messages, to which the path in a cell is added.

    Raises:
        UserError: The image can't be read.
    """
    try:
        image = Image.open(io.BytesIO(read_image(source)))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
            # Scaled by the type's range, as Pillow does for 16-bit colors; it would clip gray.
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError("32-bit gray has no fixed range of values: convert to 8 or 16 bits")
        return image if image.mode == "RGB" else image.convert("RGB")
    except DAMAGE as error:
        path = f" ({source['path']})" if isinstance(source, dict) and source["path"] else ""
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        problem = f"{name}{path} cannot be decoded ({reason}); remove or replace it."
        raise UserError(problem) from None


def read_image(source: bytes | str | os.PathLike | dict | None) -> bytes:
    """Return an image file's content; b"" for an empty cell.

    Args:
        source: The content itself, a path (also an fsspec URL such as `hf://...`), or a cell
            {"bytes", "path"} of an undecoded image column.
    """
    if isinstance(source, dict):
        source = source["path"] if source["bytes"] is None else source["bytes"]
    if source is None or isinstance(source, bytes):
        return source or b""
    with fsspec.open(source, "rb") as file:
        return file.read()


def hash_file(content: bytes) -> int:
    """Return a 64-bit hash of a file's content."""
    # Not a CRC: the CRCs inside a PNG file cancel out its pixels.
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def hash_files(dataset: Dataset) -> np.ndarray:
    """Return `hash_file` of each image, uint64 (N,); each is read once, then cached."""
    files = dataset.select_columns("image").cast_column("image", datasets.Image(decode=False))
    hashes = files.map(
        lambda batch: {"hash": np.array([hash_file(read_image(c)) for c in batch["image"]], "u8")},
        batched=True,
        batch_size=BATCH,
        remove_columns="image",
        features=Features({"hash": datasets.Value("uint64")}),
        desc="Hashing image files",
    )
    return hashes.with_format("arrow")["hash"][:].to_numpy()  # "numpy" would make them signed


def decode(
    dataset: Dataset, processor, num_proc: int | None = None, skip_corrupt: bool = False
) -> Dataset:
    """Decode each image once to uint8 (3, H, W), in the cache.

    Images keep their size if all have the same size, no larger than the model's input; otherwise
    they are resized as the processor does.

    Args:
        dataset: Columns `image`, `label`, and `row`, the image's row in the published split.
        processor: The model's image processor.
        num_proc: Processes; by default one per 10,000 images, and at most one per core.
        skip_corrupt: Skip images that can't be decoded, and print which.

    Raises:
        UserError: An image can't be decoded, or there is too little disk space.
    """
    split, cache = dataset.split or "train", dataset.cache_files
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    opened = (_open(row["image"], row["row"], split, skip_corrupt) for row in dataset)
    first = next((image for image in opened if image), None)
    if first is None:
        raise UserError(f'No image of the split "{split}" can be decoded: check its image files.')
    if num_proc is None:  # a process takes a second to start
        num_proc = min(os.cpu_count() or 1, 1 + len(dataset) // 10_000)
    size, *_ = resize = resize_options(processor)
    attempts = [(first.height, first.width, None)] if max(first.size) <= size else []
    for height, width, fit in [*attempts, (size, size, resize)]:
        shape = (3, height, width)
        needed = int(1.2 * len(dataset) * np.prod(shape))  # bytes, with Arrow's offsets
        room = (os.path.dirname(cache[0]["filename"]), needed) if cache else None
        options = {"split": split, "skip_corrupt": skip_corrupt, "shape": shape, "fit": fit}
        with suppress(_MixedSizes):
            decoded = dataset.map(
                _decode_batch,
                batched=True,
                with_indices=True,
                fn_kwargs=options | {"room": room, "version": VERSION},
                features=Features(dataset.features | {"image": Array3D(shape, "uint8")}),
                num_proc=num_proc if num_proc > 1 else None,
                desc="Decoding images",
            )
            break
    if len(decoded) < len(dataset):
        corrupt = np.flatnonzero(~np.isin(dataset["row"][:], decoded["row"][:]))
        rows = [f"{row['row']} ({row['image']['path']})" for row in dataset.select(corrupt)]
        print_once(
            f'Skipped {len(rows)} corrupt images of the split "{split}", in rows {", ".join(rows)}.'
        )
    return decoded.remove_columns("row")


class DecodedImages(torch.utils.data.Dataset):
    """A decoded split for a DataLoader, read a batch at a time.

    Rows are copied from NumPy views of the memory-mapped Arrow file, in 0.5 µs per row;
    `dataset[rows]` takes 50 to 200 µs.
    """

    def __init__(self, dataset: Dataset):
        # `datasets` has no public API that tells whether rows were selected or shuffled.
        if dataset._indices is not None:
            dataset = dataset.flatten_indices()
        self.dataset = dataset
        self.shape = dataset.features["image"].shape  # (3, H, W)
        self.images = [chunk.to_numpy() for chunk in dataset.data.column("image").chunks]
        self.labels = dataset.data.column("label").to_numpy()
        self.starts = np.cumsum([0, *map(len, self.images[:-1])])  # the first row of each chunk

    def __reduce__(self):
        return DecodedImages, (self.dataset,)  # a worker maps the file again instead of a copy

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
        """Return a batch unchanged: it is already collated."""
        return batch


def content_hash(dataset: Dataset) -> str:
    """Return a SHA-256 of decoded images and labels, the same for every copy of the same data."""
    digest, images = hashlib.sha256(), DecodedImages(dataset)
    for start in range(0, len(images), HASH_BATCH):
        batch = images.batch(range(start, min(start + HASH_BATCH, len(images))))
        digest.update(batch["pixel_values"].numpy())
        digest.update(batch["labels"].numpy())
    return digest.hexdigest()


class _MixedSizes(Exception):
    """Images have different sizes."""


def _open(cell: dict | None, row: int, split: str, skip_corrupt: bool) -> Image.Image | None:
    with suppress(*[UserError] if skip_corrupt else []):
        return open_image(cell, f'The image in row {row} of the split "{split}"')


def _decode_batch(
    batch: dict, indices: list[int], split, skip_corrupt, shape, fit, room, version
) -> dict:
    """Decode a batch; resize images of another shape by `fit`, or raise _MixedSizes without it."""
    if room and indices[0] == 0:  # checked here, where it is skipped if the result is cached
        (folder, needed), free = room, shutil.disk_usage(room[0]).free
        if free < needed:
            raise UserError(
                f"The decoded images need {needed / 1e9:.1f} GB in {folder}, but {free / 1e9:.1f} "
                "GB are free: free disk space, or set HF_DATASETS_CACHE to another disk."
            )
    images, decoded = np.empty((len(indices), *shape), np.uint8), []
    for i, (cell, row) in enumerate(zip(batch["image"], batch["row"], strict=True)):
        if (image := _open(cell, row, split, skip_corrupt)) is None:
            continue
        if (3, image.height, image.width) != shape:
            if fit is None:
                raise _MixedSizes
            image = fit_image(image, *fit)
        images[len(decoded)] = np.asarray(image).transpose(2, 0, 1)  # (H, W, 3) to (3, H, W)
        decoded.append(i)
    columns = {name: [batch[name][i] for i in decoded] for name in ("label", "row")}
    return {"image": images[: len(decoded)], **columns}
