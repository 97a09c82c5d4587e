"""Train from a dataset too large for the disk: read where it lies, decoded on the way, not kept.

Sharding, shuffling and resuming are those of `datasets.IterableDataset`. What is added is the split
by content: a hash of an image's file says whether it belongs to train, validation or test, the same
for every process, seed and order, with no list to keep; equal files are never in two splits.
"""

import atexit
import json
import math
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice, repeat
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image

from pipeline.data.decoding import hash_file, open_cell, read_file
from pipeline.data.labels import MISSING, encode
from pipeline.data.transforms import fit_image
from pipeline.errors import UserError

NUM_OPEN_SHARDS = 16  # shards that one process reads in turns
SHUFFLE_BUFFER = 2048  # undecoded images that one process holds and shuffles
READ_BATCH = 128  # images, = SHUFFLE_BUFFER / NUM_OPEN_SHARDS
RESHARD_BELOW = 256  # shards; more files are not cut into row groups, since that reads each footer
VALIDATION_IMAGES = 2000  # at most, decoded in every process
PREFETCH = 2  # batches decoded ahead of the one in use
SMALL_FILE = 16_384  # bytes; below, one thread decodes faster than several that share the GIL


def assign_split(file: bytes, validation_size: float, test_size: float) -> str:
    """Return "train", "validation" or "test" for an image file, by a hash of its bytes."""
    position = hash_file(file) / 2**64
    if position < validation_size:
        return "validation"
    return "test" if position >= 1 - test_size else "train"


class LabeledStream:
    """The undecoded images of one split in a published stream, as `image` and `label`.

    Args:
        stream: A published split.
        name: Its name.
        image: Its image column.
        label: Its label column.
        names: The classes.
        split: Which part of it, by `assign_split`; None for all.
        validation_size: See `assign_split`.
        test_size: See `assign_split`.
        skip_corrupt: Leave out images that can't be decoded, and print which.
    """

    def __init__(
        self,
        stream: IterableDataset,
        name: str,
        image: str,
        label: str,
        names: list[str],
        split: str | None,
        validation_size: float,
        test_size: float,
        skip_corrupt: bool = False,
    ):
        self.name, self.names, self.split = name, names, split
        self.sizes, self.skip_corrupt = (validation_size, test_size), skip_corrupt
        self.label_type = stream.features[label]
        stream = stream.cast_column(image, datasets.Image(decode=False))
        stream = stream.reshard() if stream.num_shards < RESHARD_BELOW else stream
        self.features = Features(
            {"image": stream.features[image], "label": ClassLabel(names=names)}
        )
        self.rows = stream.with_format("arrow").map(
            self._select, batched=True, batch_size=READ_BATCH, features=self.features,
            fn_kwargs={"image": image, "label": label},
        )  # fmt: skip

    def sample(self, size: int) -> Dataset:
        """Return at most `size` images, as many from each shard, in memory."""
        shards = self.rows.num_shards
        step = math.ceil(shards / size)
        each = math.ceil(size / len(range(0, shards, step)))
        images = [
            example
            for shard in range(0, shards, step)
            for example in islice(_examples(self.rows.shard(shards, shard)), each)
        ]
        return self._with_rows(Dataset.from_list(images[:size], features=self.features))

    def store(self) -> Dataset:
        """Return all images, undecoded, on disk until this process ends."""
        os.makedirs(datasets.config.HF_DATASETS_CACHE, exist_ok=True)
        folder = tempfile.mkdtemp(prefix="streamed-", dir=datasets.config.HF_DATASETS_CACHE)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return self._with_rows(
            Dataset.from_generator(
                _examples, self.features, folder, gen_kwargs={"rows": self.rows},
                fingerprint=os.path.basename(folder), split=self.name,
            )
        )  # fmt: skip

    @staticmethod
    def _with_rows(dataset: Dataset) -> Dataset:
        return dataset.add_column("row", np.arange(len(dataset))) if len(dataset) else dataset

    def _select(self, table: pa.Table, image: str, label: str) -> pa.Table:
        """Keep the images of this split, with their content; UserError for an unusable row."""
        labels = encode(table[label], self.label_type, self.names, self.name)
        images, unusable = table[image], labels == MISSING
        files = pc.struct_field(images, "bytes")
        if files.null_count:
            paths = pc.struct_field(images, "path").to_pylist()
            files = [
                _read(path) if file is None else file
                for file, path in zip(files.to_pylist(), paths, strict=True)
            ]
            cells = [{"bytes": file, "path": path} for file, path in zip(files, paths, strict=True)]
            unusable |= np.array([file is None for file in files])
            images = pa.array(cells, datasets.Image.pa_type)
        if unusable.any():
            row = int(unusable.argmax())
            path, value = pc.struct_field(images, "path")[row], table[label][row]
            raise UserError(
                f'In the split "{self.name}", the image {path} lacks its content or a label from 0 '
                f"to {len(self.names) - 1}: its label is {value}."
            )
        selected = pa.table({"image": images, "label": labels})
        if self.split is None:
            return selected
        files = files if isinstance(files, list) else files.to_pylist()
        return selected.filter([assign_split(file, *self.sizes) == self.split for file in files])


class ImageStream(torch.utils.data.IterableDataset):
    """Endless training batches for one of several processes; a DataLoader leaves them as they are.

    Each batch is {"pixel_values": uint8 (B, 3, H, W), "labels": int64 (B,)}. H and W are the
    images' own where a batch's share one size of at most `image_size`, else `image_size`.

    Args:
        rows: The train split.
        batch_size: Images in a batch.
        image_size: Side of the model's input, in pixels.
        resample: Pillow's filter for images that are resized.
        seed: Of the order of shards and images.
        rank: This process, from 0.
        world_size: Processes that share the images.
        num_threads: Threads that decode; by default one per core.
        crop: Crop the center of images that are resized.
    """

    def __init__(
        self,
        rows: LabeledStream,
        batch_size: int,
        image_size: int,
        resample: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_threads: int | None = None,
        crop: bool = False,
    ):
        self.name, self.batch_size, self.skip_corrupt = rows.name, batch_size, rows.skip_corrupt
        self.corrupt: set[int] = set()  # hashes of the files left out
        self.image_size, self.fit = image_size, (image_size, resample, crop)
        self.num_threads = num_threads or os.cpu_count() or 1
        self.rank, self.world_size = rank, world_size
        stream = rows.rows.shuffle(seed, buffer_size=SHUFFLE_BUFFER,
                                   max_buffer_input_shards=NUM_OPEN_SHARDS)  # fmt: skip
        self.stream = split_dataset_by_node(stream, rank, world_size)
        self.state: dict = {"batches": 0, "epoch": 0, "stream": None}  # after the last batch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        # The Trainer, resumed, takes the batches it has seen and drops them: here they are empty.
        yield from repeat({}, self.state["batches"])
        for batch, state in prefetch(self._batches(), PREFETCH):
            self.state = state
            yield batch

    def save(self, folder: Path) -> None:
        """Write the position after the last batch that was given out."""
        (folder / self._file()).write_text(json.dumps(self.state), "utf-8")

    def resume(self, folder: Path) -> None:
        """Go on from where `save` was, as `IterableDataset.load_state_dict` does.

        The images that the shuffle buffer held then are skipped in that epoch.

        Raises:
            UserError: It was saved with another number of processes.
        """
        try:
            self.state = json.loads((folder / self._file()).read_text("utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{folder} is not of a streamed run in {self.world_size} processes: go on with as "
                "many as before, or start again with ARGS=--restart."
            ) from None

    def _file(self) -> str:
        return f"stream_{self.rank}_of_{self.world_size}.json"

    def _batches(self) -> Iterator[tuple[dict[str, torch.Tensor], dict]]:
        """Batches, each with the state after it."""
        batches = self.state["batches"]
        resumed = self.state["stream"] is not None
        if resumed:
            self.stream.load_state_dict(self.state["stream"])
        with ThreadPoolExecutor(self.num_threads) as pool:
            for epoch in count(self.state["epoch"]):
                self.stream.set_epoch(epoch)
                is_empty = not resumed  # the rest of an epoch may be
                for table in self.stream.iter(self.batch_size):
                    batch = self._decode(table, pool)
                    if batch is None:  # all of it is corrupt
                        continue
                    is_empty = False
                    batches += 1
                    state = {"batches": batches, "epoch": epoch}
                    yield batch, state | {"stream": self.stream.state_dict()}
                if is_empty:
                    raise UserError(
                        f'The split "{self.name}" has no training image for each of '
                        f"{self.world_size} processes."
                    )
                resumed = False

    def _decode(self, table: pa.Table, pool: ThreadPoolExecutor) -> dict[str, torch.Tensor] | None:
        square, cells = (self.image_size, self.image_size), table["image"].to_pylist()
        if table.nbytes < SMALL_FILE * len(cells):
            images = self._open(cells)
        else:
            step = -(-len(cells) // self.num_threads)
            parts = [cells[start : start + step] for start in range(0, len(cells), step)]
            images = [image for part in pool.map(self._open, parts) for image in part]
        labels = table["label"].to_numpy().astype(np.int64)
        if None in images:
            labels = labels[[image is not None for image in images]]
            images = [image for image in images if image is not None]
            if not images:
                return None
        if len({image.size for image in images}) > 1:
            images = [i if i.size == square else fit_image(i, *self.fit) for i in images]
        pixels = np.stack([np.asarray(image) for image in images])  # (B, H, W, 3)
        return {"pixel_values": torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
                "labels": torch.from_numpy(labels)}  # fmt: skip

    def _open(self, cells: list[dict]) -> list[Image.Image | None]:
        """Images, no larger than the model's input; None for a corrupt one that may be skipped."""
        images = []
        for cell in cells:
            try:
                image = open_cell(cell, f'An image of the split "{self.name}"')
                is_large = max(image.size) > self.image_size
                images.append(fit_image(image, *self.fit) if is_large else image)
            except UserError as error:
                if not self.skip_corrupt:
                    raise
                images.append(None)
                if (key := hash_file(cell["bytes"])) not in self.corrupt:  # not in each epoch
                    self.corrupt.add(key)
                    print(f"Left out corrupt image {len(self.corrupt)}: {error}")
        return images


def prefetch(items: Iterator, size: int) -> Iterator:
    """Give the items of an endless iterator in order, `size` of them made ahead in a thread."""
    with ThreadPoolExecutor(1) as thread:
        ahead = deque(thread.submit(next, items) for _ in range(size))
        while True:
            ahead.append(thread.submit(next, items))
            yield ahead.popleft().result()


def _read(path: str | None) -> bytes | None:
    try:
        return path and read_file(path)
    except FileNotFoundError:
        return None


def _examples(rows: IterableDataset) -> Iterator[dict]:
    for table in rows.iter(READ_BATCH):
        yield from table.to_pylist()
