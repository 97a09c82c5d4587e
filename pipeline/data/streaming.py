"""Learn from a dataset too large for the disk: read where it lies, decoded on the way, not kept.

Each process reads shards of its own, several in turns, in an order drawn anew for every epoch,
and shuffles block by block of undecoded images in memory. So images mix within a block and
across the shards read together: a dataset sorted by class should be mixed when it is published.

Which part an image belongs to is told by a hash of its file: the same for every process, seed
and order, with no list to keep, and equal files never lie on both sides.
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
from itertools import chain, islice, repeat
from pathlib import Path
from typing import NamedTuple

import datasets
import fsspec
import numpy as np
import torch
from datasets import Array3D, ClassLabel, Dataset, Features
from PIL import Image

from pipeline.data import TEST_SIZE, column, decode, digits, load_published, open_image
from pipeline.errors import UserError
from pipeline.recipe import DataArguments

READERS = 16  # shards that a process reads in turns
MANY_SHARDS = 256  # from here on, files are not cut into their row groups: that reads each footer
BLOCK = 2048  # images, as files, that a process holds and shuffles
VALIDATION = 2000  # images at most, held decoded by each process


class Example(NamedTuple):
    file: bytes
    label: int
    where: str  # for messages


class Rows:
    """The rows of one published split, undecoded, by shard."""

    def __init__(self, data: DataArguments, split: str):
        if data.dataset == "digits":
            published = {"train": digits().to_iterable_dataset(num_shards=8)}
        else:
            published = load_published(data, streaming=True)
        named = [split] if data.test_split == DataArguments.test_split else [split, data.test_split]
        if missing := [name for name in named if name not in published]:
            raise UserError(
                f'The dataset "{data.dataset}" has no split "{missing[0]}"; it has '
                f"{', '.join(published)}."
            )
        rows = published[split]
        if rows.features is None:
            raise UserError(f'The dataset "{data.dataset}" does not say what its columns hold.')
        self.image = column(rows, datasets.Image, data.image_column, "image", data.dataset)
        self.label = column(rows, ClassLabel, data.label_column, "label", data.dataset)
        self.split, self.names = split, rows.features[self.label].names
        rows = rows.select_columns([self.image, self.label])
        rows = rows.reshard() if rows.num_shards < MANY_SHARDS else rows
        self.table = rows.cast_column(self.image, datasets.Image(decode=False))
        self.shards = rows.num_shards
        self.validation_size = data.validation_size
        self.test_size = 0.0 if data.test_split in published else TEST_SIZE

    def shard(self, number: int, start: int = 0) -> Iterator[Example]:
        """From row `start` on. UserError for a row without an image or a label."""
        for row, cells in enumerate(islice(self.table.shard(self.shards, number), start, None)):
            cell, label = cells[self.image], cells[self.label]
            where = f"{start + row} of shard {number}"
            if cell is None or label is None or not 0 <= label < len(self.names):
                raise UserError(
                    f'The split "{self.split}", row {where}, lacks an image or a label from 0 to '
                    f"{len(self.names) - 1}."
                )
            file = cell["bytes"]
            if file is None:
                with fsspec.open(cell["path"], "rb") as opened:
                    file = opened.read()
            yield Example(file, label, where)

    def part(self, example: Example) -> str:
        """train, validation, or test where none is published."""
        # Not a CRC: those that a PNG holds cancel its pixels out.
        digest = hashlib.blake2b(example.file, digest_size=8).digest()
        place = int.from_bytes(digest, "big") / 2**64
        if place < self.validation_size:
            return "validation"
        return "test" if place >= 1 - self.test_size else "train"


class ImageStream(torch.utils.data.IterableDataset):
    """Endless training batches for one of several processes; a DataLoader leaves them as they are.

    Each is {"pixel_values": uint8 (B, 3, H, W), "labels": int64 (B,)}. H and W are the images'
    own where a batch's share one size of at most `image_size`, else `image_size`. In an epoch,
    every image of the training part is in one batch of one process.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        image_size: int,
        resample: int,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
        threads: int | None = None,
    ):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.image_size, self.resample = image_size, resample
        self.process, self.processes, self.threads = process, processes, threads
        self.by_shard = rows.shards >= processes  # else each reads all, and decodes its own
        self.start, self.skip = {"before": 0, "epoch": 0, "position": BEGINNING}, 0
        self.blocks = deque()

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        # The Trainer, resumed, draws what it has seen and drops it: that costs nothing so.
        seen = repeat({}, (self.start["before"] + self.skip) // self.batch_size)
        return chain(seen, _ahead(self._batches(), 2))

    def save(self, folder: Path, batches: int) -> None:
        """Write where this process stands after so many batches, for `resume`."""
        images = batches * self.batch_size
        while len(self.blocks) > 1 and self.blocks[1]["before"] <= images:
            self.blocks.popleft()
        state = {"images": images, "block": self.blocks[0] if self.blocks else self.start}
        (folder / self._file()).write_text(json.dumps(state))

    def resume(self, folder: Path) -> None:
        """Go on from where `save` was, after as many empty batches as there were before.

        UserError where that was another number of processes.
        """
        try:
            state = json.loads((folder / self._file()).read_text())
        except FileNotFoundError:
            raise UserError(
                f"{folder} is not of a streamed run in {self.processes} processes: go on with as "
                "many as before, or begin anew with ARGS=--restart."
            ) from None
        self.start, self.skip = state["block"], state["images"] - state["block"]["before"]

    def _file(self) -> str:
        return f"stream_{self.process}_of_{self.processes}.json"

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        examples = (example for block in _ahead(self._blocks(), 1) for example in block)
        examples = islice(examples, self.skip, None)
        with ThreadPoolExecutor(self.threads or os.cpu_count()) as pool:
            while True:
                batch = list(islice(examples, self.batch_size))
                images = decoded(batch, self.rows.split, self.image_size, self.resample, pool)
                labels = torch.tensor([example.label for example in batch])
                yield {"pixel_values": torch.from_numpy(images), "labels": labels}

    def _blocks(self) -> Iterator[list[Example]]:
        before, epoch, position = (self.start[key] for key in ("before", "epoch", "position"))
        while True:
            reader = Reader(self.rows, self._shards(epoch), position)
            own, began = self._own(reader), before
            while True:
                self.blocks.append({"before": before, "epoch": epoch, "position": position})
                block = list(islice(own, BLOCK))
                if not block:
                    break
                np.random.default_rng((self.seed, self.process, before)).shuffle(block)
                yield block
                before, position = before + len(block), reader.position()
            if position == BEGINNING and before == began:
                raise UserError(
                    f'The split "{self.rows.split}" has no training image for each of '
                    f"{self.processes} processes."
                )
            epoch, position = epoch + 1, BEGINNING

    def _shards(self, epoch: int) -> list[int]:
        order = np.random.default_rng((self.seed, epoch)).permutation(self.rows.shards).tolist()
        return order[self.process :: self.processes] if self.by_shard else order

    def _own(self, reader: "Reader") -> Iterator[Example]:
        for example in reader:
            mine = self.by_shard or reader.read % self.processes == self.process
            if mine and self.rows.part(example) == "train":
                yield example


BEGINNING = {"read": 0, "next": 0, "turn": 0, "open": []}


class Reader:
    """The rows of some shards, READERS of them in turns. `read` counts them."""

    def __init__(self, rows: Rows, shards: list[int], position: dict):
        self.rows, self.shards = rows, shards
        self.read, self.next, self.turn = (position[key] for key in ("read", "next", "turn"))
        self.open = [[shard, row, rows.shard(shard, row)] for shard, row in position["open"]]

    def __iter__(self) -> Iterator[Example]:
        while True:
            while len(self.open) < READERS and self.next < len(self.shards):
                shard = self.shards[self.next]
                self.open.append([shard, 0, self.rows.shard(shard)])
                self.next += 1
            if not self.open:
                return
            self.turn %= len(self.open)
            example = next(self.open[self.turn][2], None)
            if example is None:
                del self.open[self.turn]
                continue
            self.open[self.turn][1] += 1
            self.turn += 1
            self.read += 1
            yield example

    def position(self) -> dict:
        """Plain values, as BEGINNING: of each open shard its number, and the rows read of it."""
        opened = [[shard, row] for shard, row, _ in self.open]
        return {"read": self.read, "next": self.next, "turn": self.turn, "open": opened}


def held_out(data: DataArguments, part: str, image_size: int, resample: int) -> Dataset:
    """The validation or the test split of a streamed dataset, as `data.load_splits` gives it.

    Validation: as many images from each shard, VALIDATION at most, in memory. Test: all, on
    disk until this process ends. UserError where there are none.
    """
    rows = Rows(data, data.train_split)
    if part == "test":
        return _test(rows, data, image_size, resample)
    step = math.ceil(rows.shards / VALIDATION)
    shards = range(0, rows.shards, step)
    examples = []
    for shard in shards:
        found = (example for example in rows.shard(shard) if rows.part(example) == "validation")
        examples += islice(found, math.ceil(VALIDATION / len(shards)))
    examples = examples[:VALIDATION]
    if not examples:
        raise UserError(f"No image is left for validation_size={data.validation_size}: give more.")
    with ThreadPoolExecutor(data.num_proc or os.cpu_count()) as pool:
        images = decoded(examples, rows.split, image_size, resample, pool)
    label = ClassLabel(names=rows.names)
    return Dataset.from_dict(
        {"image": list(images), "label": [example.label for example in examples]},
        features=Features({"image": Array3D(images.shape[1:], "uint8"), "label": label}),
    )


def decoded(
    examples: list[Example], split: str, image_size: int, resample: int, pool: ThreadPoolExecutor
) -> np.ndarray:
    """uint8 (B, 3, H, W): see `ImageStream`."""
    target = (image_size, image_size)

    def read(example: Example) -> Image.Image:
        image = open_image({"bytes": example.file}, split, example.where)
        return image if max(image.size) <= image_size else image.resize(target, resample)

    images = list(pool.map(read, examples))
    if len({image.size for image in images}) > 1:
        images = [i if i.size == target else i.resize(target, resample) for i in images]
    return (
        np.stack([np.asarray(i) for i in images]).transpose(0, 3, 1, 2).copy()
    )  # from (B, H, W, 3)


def _test(rows: Rows, data: DataArguments, image_size: int, resample: int) -> Dataset:
    published = rows.test_size == 0
    rows = Rows(data, data.test_split) if published else rows

    def cells() -> Iterator[dict]:
        for shard in range(rows.shards):
            for example in rows.shard(shard):
                if published or rows.part(example) == "test":
                    yield {"image": {"bytes": example.file, "path": None}, "label": example.label}

    os.makedirs(datasets.config.HF_DATASETS_CACHE, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="streamed-", dir=datasets.config.HF_DATASETS_CACHE)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=rows.names)})
    dataset = Dataset.from_generator(
        cells, features, folder, fingerprint=os.path.basename(folder), split="test"
    )
    if len(dataset) == 0:
        raise UserError(f'The dataset "{data.dataset}" has no images to test on.')
    return decode(dataset, "test", image_size, resample, data.num_proc)


def _ahead(items: Iterator, count: int) -> Iterator:
    """The same endless items, in order, `count` of them fetched in the background."""
    with ThreadPoolExecutor(1) as thread:
        fetched = deque(thread.submit(next, items) for _ in range(count))
        while True:
            item = fetched.popleft().result()
            fetched.append(thread.submit(next, items))
            yield item
