"""Train from a dataset too large for the disk: read where it lies, decoded on the way, not kept.

Sharding, shuffling and resuming are those of `datasets.IterableDataset`. What is added is the split
by content: a hash of an image's file says whether it belongs to train, validation or test, the same
for every process, seed and order, with no list to keep; equal files are never in two splits.
"""

import atexit
import hashlib
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
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, IterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image

from pipeline.data.decoding import open_cell
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
    # Not a CRC: those inside a PNG cancel its pixels out.
    digest = hashlib.blake2b(file, digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    if position < validation_size:
        return "validation"
    return "test" if position >= 1 - test_size else "train"


class LabeledStream:
    """The undecoded images of one split in a published stream, as `image` and `label`.

    Args:
        stream: A published split.
        image: Its image column.
        label: Its label column.
        split: Which part of it, by `assign_split`; None for all.
        validation_size: See `assign_split`.
        test_size: See `assign_split`.
    """

    def __init__(
        self,
        stream: IterableDataset,
        image: str,
        label: str,
        split: str | None,
        validation_size: float,
        test_size: float,
    ):
        self.name, self.split = str(stream.split), split
        self.sizes = (validation_size, test_size)
        self.names = stream.features[label].names
        stream = stream.cast_column(image, datasets.Image(decode=False))
        stream = stream.reshard() if stream.num_shards < RESHARD_BELOW else stream
        self.features = Features({"image": stream.features[image], "label": stream.features[label]})
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
        table = pa.table({"image": table[image], "label": table[label]})
        labels = table["label"].to_numpy()
        unusable = ~((labels >= 0) & (labels < len(self.names)))  # also where it is missing: NaN
        files = pc.struct_field(table["image"], "bytes")
        if files.null_count:
            paths = pc.struct_field(table["image"], "path").to_pylist()
            files = [
                _read(path) if file is None else file
                for file, path in zip(files.to_pylist(), paths, strict=True)
            ]
            cells = [{"bytes": file, "path": path} for file, path in zip(files, paths, strict=True)]
            unusable |= np.array([file is None for file in files])
            images = pa.array(cells, datasets.Image.pa_type)
            table = pa.table({"image": images, "label": table["label"]})
        if unusable.any():
            row = table.slice(int(unusable.argmax()), 1).to_pylist()[0]
            raise UserError(
                f'In the split "{self.name}", the image {row["image"] and row["image"]["path"]} '
                f"lacks its content or a label from 0 to {len(self.names) - 1}: its label is "
                f"{row['label']}."
            )
        if self.split is None:
            return table
        files = files if isinstance(files, list) else files.to_pylist()
        return table.filter([assign_split(file, *self.sizes) == self.split for file in files])


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
    ):
        self.name, self.batch_size = rows.name, batch_size
        self.image_size, self.resample = image_size, resample
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
                    is_empty = False
                    batches += 1
                    state = {"batches": batches, "epoch": epoch}
                    yield self._decode(table, pool), state | {"stream": self.stream.state_dict()}
                if is_empty:
                    raise UserError(
                        f'The split "{self.name}" has no training image for each of '
                        f"{self.world_size} processes."
                    )
                resumed = False

    def _decode(self, table: pa.Table, pool: ThreadPoolExecutor) -> dict[str, torch.Tensor]:
        square = (self.image_size, self.image_size)

        def read(cells: list[dict]) -> list[Image.Image]:
            images = [open_cell(cell, f'An image of the split "{self.name}"') for cell in cells]
            return [i if max(i.size) <= self.image_size else i.resize(square, resample)
                    for i in images]  # fmt: skip

        resample, cells = self.resample, table["image"].to_pylist()
        if table.nbytes < SMALL_FILE * len(cells):
            images = read(cells)
        else:
            step = -(-len(cells) // self.num_threads)
            parts = [cells[start : start + step] for start in range(0, len(cells), step)]
            images = [image for part in pool.map(read, parts) for image in part]
        if len({image.size for image in images}) > 1:
            images = [i if i.size == square else i.resize(square, resample) for i in images]
        pixels = np.stack([np.asarray(image) for image in images])  # (B, H, W, 3)
        labels = torch.from_numpy(table["label"].to_numpy().astype(np.int64))
        return {"pixel_values": torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
                "labels": labels}  # fmt: skip


def prefetch(items: Iterator, size: int) -> Iterator:
    """Give the items of an endless iterator in order, `size` of them made ahead in a thread."""
    with ThreadPoolExecutor(1) as thread:
        ahead = deque(thread.submit(next, items) for _ in range(size))
        while True:
            ahead.append(thread.submit(next, items))
            yield ahead.popleft().result()


def _read(path: str | None) -> bytes | None:
    if path is None:
        return None
    with fsspec.open(path, "rb") as file:
        return file.read()


def _examples(rows: IterableDataset) -> Iterator[dict]:
    for table in rows.iter(READ_BATCH):
        yield from table.to_pylist()
