"""Train from a dataset too large for the disk: images are read remotely, decoded and not stored.

Sharding, shuffling and resuming are those of `datasets.IterableDataset`. This module adds a split
by content: a hash of the image file decides whether it belongs to train, validation or test. It is
the same for every process, seed and order, and identical files are never in two splits.
"""

import atexit
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, repeat
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image

from pipeline.data.decoding import hash_file, open_image, read_image
from pipeline.data.labels import MISSING, encode
from pipeline.data.sources import Source, load_source
from pipeline.data.splits import TEST_SIZE
from pipeline.data.transforms import fit_image, resize_options
from pipeline.errors import UserError
from pipeline.recipe import DataArguments

NUM_OPEN_SHARDS = 16  # shards that a process reads alternately
SHUFFLE_BUFFER = 2048  # undecoded images that a process buffers and shuffles
READ_BATCH = 128  # images, = SHUFFLE_BUFFER / NUM_OPEN_SHARDS
RESHARD_BELOW = 256  # shards; more files are not split by row group, which reads every footer
VALIDATION_IMAGES = 2000  # maximum, decoded in every process
PREFETCH = 2  # batches decoded ahead of the one in use
SMALL_FILE = 16_384  # bytes; below this, one thread decodes faster than several sharing the GIL

# `datasets` would sleep 5 s after each epoch, to wait for pyarrow threads that have already ended.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0


def assign_split(file: bytes, validation_size: float, test_size: float) -> str:
    """Return "train", "validation" or "test" for an image file, by a hash of its bytes."""
    position = hash_file(file) / 2**64
    if position < validation_size:
        return "validation"
    return "test" if position >= 1 - test_size else "train"


def load_stream(data: DataArguments | Source, split: str) -> IterableDataset:
    """Open "train", "validation" or "test" as an undecoded stream of `image` and `label`."""
    source = load_source(data)
    data, role = source.data, split if split in source.splits else "train"
    if role not in source.splits:
        raise UserError(f'The dataset "{data.dataset}" has no {split} split: set --{split}_split.')
    if split == "train" and data.max_train_samples is not None:
        raise UserError("A stream has no fixed number of images: remove max_train_samples.")
    stream, name = source.splits[role], source.roles[role]
    if source.label not in stream.features:
        raise UserError(f'The split "{name}" has no labels: choose another one.')
    sizes = {"validation": data.validation_size, "test": TEST_SIZE}
    sizes = [0.0 if role in source.splits else size for role, size in sizes.items()]
    stream = stream.cast_column(source.image, datasets.Image(decode=False))
    stream = stream.reshard() if stream.num_shards < RESHARD_BELOW else stream
    features = {"image": datasets.Image(decode=False), "label": ClassLabel(names=source.names)}
    options = {"kind": stream.features[source.label], "names": source.names, "published": name}
    options |= {"image": source.image, "label": source.label, "sizes": sizes}
    return stream.with_format("arrow").map(
        _select,
        batched=True,
        batch_size=READ_BATCH,
        features=Features(features),
        fn_kwargs=options | {"split": split if role == "train" and any(sizes) else None},
    )


def store_stream(rows: IterableDataset, split: str) -> Dataset:
    """Store the undecoded images of a stream, with columns `image`, `label` and `row`.

    For "validation", this is a sample with as many images from each shard, in memory; otherwise it
    is all images, on disk until this process ends.
    """
    rows = rows.with_format(None)
    if split == "validation":
        shards = range(0, rows.num_shards, -(-rows.num_shards // VALIDATION_IMAGES))
        each = -(-VALIDATION_IMAGES // len(shards))
        sample = [row for i in shards for row in rows.shard(rows.num_shards, i).take(each)]
        images = Dataset.from_list(sample[:VALIDATION_IMAGES], rows.features)
    else:
        os.makedirs(datasets.config.HF_DATASETS_CACHE, exist_ok=True)
        folder = tempfile.mkdtemp(prefix="streamed-", dir=datasets.config.HF_DATASETS_CACHE)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        name = os.path.basename(folder)
        images = Dataset.from_generator(
            rows.__iter__, rows.features, folder, fingerprint=name, split=rows.split or "test"
        )
    return images.add_column("row", np.arange(len(images)))


@dataclass(eq=False)
class ImageStream(torch.utils.data.IterableDataset):
    """Endless training batches for one of several processes; a DataLoader passes them through.

    Each batch is {"pixel_values": uint8 (B, 3, H, W), "labels": int64 (B,)}. H and W are those of
    the images if all in the batch agree and fit the model's input, otherwise its input size.
    """

    rows: IterableDataset  # the train split, see `load_stream`
    batch_size: int  # per process
    processor: Any  # the model's image processor
    seed: int = 0  # for the order of shards and images
    rank: int = 0  # of this process
    world_size: int = 1  # number of processes that share the images
    num_threads: int | None = None  # decoding threads; one per core by default
    skip_corrupt: bool = False  # skip images that can't be decoded, and print which

    def __post_init__(self):
        self.split = self.rows.split or "train"
        self.corrupt: set[int] = set()  # hashes of the skipped files
        self.fit = resize_options(self.processor)
        stream = self.rows.shuffle(
            self.seed, buffer_size=SHUFFLE_BUFFER, max_buffer_input_shards=NUM_OPEN_SHARDS
        )
        self.stream = split_dataset_by_node(stream, self.rank, self.world_size)
        self.state = {"batches": 0, "epoch": 0, "stream": None}  # after the last batch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        # A resumed Trainer skips the batches it has already seen, so these can be empty.
        yield from repeat({}, self.state["batches"])
        batches = self._batches()
        with ThreadPoolExecutor(1) as thread:
            ahead = deque(thread.submit(next, batches) for _ in range(PREFETCH))
            while True:
                ahead.append(thread.submit(next, batches))
                batch, self.state = ahead.popleft().result()
                yield batch

    def save(self, folder: Path) -> None:
        """Save the position after the last batch that was yielded."""
        (folder / self._file()).write_text(json.dumps(self.state), "utf-8")

    def resume(self, folder: Path) -> None:
        """Continue from a saved position, without the images then in the shuffle buffer.

        `IterableDataset.load_state_dict` resumes this way too.

        Raises:
            UserError: The state was not saved by a run with the same number of processes.
        """
        try:
            self.state = json.loads((folder / self._file()).read_text("utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{folder} was not saved by a streamed run in {self.world_size} processes: resume "
                "with as many processes as before, or start again with ARGS=--restart."
            ) from None

    def _file(self) -> str:
        return f"stream_{self.rank}_of_{self.world_size}.json"

    def _batches(self) -> Iterator[tuple[dict[str, torch.Tensor], dict]]:
        """Yield batches, each with the state after it."""
        batches, resumed = self.state["batches"], self.state["stream"] is not None
        if resumed:
            self.stream.load_state_dict(self.state["stream"])
        with ThreadPoolExecutor(self.num_threads or os.cpu_count()) as pool:
            for epoch in count(self.state["epoch"]):
                self.stream.set_epoch(epoch)
                start = batches
                for table in self.stream.iter(self.batch_size):
                    if batch := self._decode(table, pool):
                        batches += 1
                        state = {"batches": batches, "epoch": epoch}
                        yield batch, state | {"stream": self.stream.state_dict()}
                if batches == start and not resumed:  # the rest of a resumed epoch may be empty
                    raise UserError(
                        f'The split "{self.split}" has too few training images for '
                        f"{self.world_size} processes: use fewer."
                    )
                resumed = False

    def _decode(self, table: pa.Table, pool: ThreadPoolExecutor) -> dict[str, torch.Tensor] | None:
        """Decode a batch; return None if all of its images are corrupt."""
        cells = table["image"].to_pylist()
        is_small = table.nbytes < SMALL_FILE * len(cells)
        images = list(map(self._open, cells) if is_small else pool.map(self._open, cells))
        labels = table["label"].to_numpy()[[image is not None for image in images]]
        images = [image for image in images if image is not None]
        if not images:
            return None
        if len({image.size for image in images}) > 1:
            images = [fit_image(image, *self.fit) for image in images]
        pixels = np.stack([np.asarray(image) for image in images])
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))  # (B, H, W, 3) to (B, 3, H, W)
        return {"pixel_values": torch.from_numpy(pixels), "labels": torch.from_numpy(labels)}

    def _open(self, cell: dict) -> Image.Image | None:
        """Open an image, no larger than the model's input; None for a skipped corrupt image."""
        try:
            image = open_image(cell, f'An image of the split "{self.split}"')
        except UserError as error:
            if not self.skip_corrupt:
                raise
            if (key := hash_file(cell["bytes"])) not in self.corrupt:  # print it once
                self.corrupt.add(key)
                print(f"Skipped corrupt image {len(self.corrupt)}: {error}")
            return None
        return fit_image(image, *self.fit) if max(image.size) > self.fit[0] else image


def _select(table: pa.Table, kind, names, published, image, label, sizes, split) -> pa.Table:
    """Return image files and labels: all of a published split, or only those of `split`."""
    labels = encode(table[label], kind, names, published)
    files, paths = (pc.struct_field(table[image], field) for field in ("bytes", "path"))
    if (missing := labels == MISSING).any():
        row = int(missing.argmax())
        raise UserError(
            f'In the split "{published}", an image lacks a label from 0 to {len(names) - 1}: '
            f"{paths[row]} has the label {table[label][row]}; correct or remove it."
        )
    if files.null_count:  # they are stored outside the table
        try:
            files = pa.array([read_image(cell) for cell in table[image].to_pylist()])
        except OSError as error:
            raise UserError(f'Cannot read an image of the split "{published}": {error}') from None
    images = pc.make_struct(files, paths, field_names=["bytes", "path"])
    selected = pa.table({"image": images, "label": labels})
    if split is None:
        return selected
    return selected.filter([assign_split(f, *sizes) == split for f in files.to_pylist()])
