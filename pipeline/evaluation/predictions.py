"""Classify image files or a dataset's split, and write a row per image to a CSV or parquet file.

Predictions equal those of `transformers.pipeline()`. Any number of images fits in memory.
"""

import glob
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from datasets import Image as ImageFeature
from PIL import Image
from tqdm.auto import tqdm

from pipeline import runs
from pipeline.data.decoding import open_image
from pipeline.data.folders import IMAGES, is_image, walk
from pipeline.data.loading import load_raw
from pipeline.data.transforms import fit_image, input_size, preprocess
from pipeline.errors import UserError
from pipeline.evaluation import ood
from pipeline.evaluation.outputs import pool_layer
from pipeline.recipe import DataArguments
from pipeline.training.model import load_model

FIRST = 5  # rows returned as a preview
WRITERS = {".csv": pyarrow.csv.CSVWriter, ".parquet": pyarrow.parquet.ParquetWriter}


@dataclass
class Item:
    """One image to classify: its name in the table, and a function that opens it."""

    name: str
    open: Callable[[], Image.Image]


def find_images(patterns: list[str]) -> Iterator[Item]:
    """Find image files by file names, glob patterns and folders, including subfolders.

    Raises:
        UserError: A pattern matches no image.
    """
    for pattern in patterns:
        if next(_match(pattern), None) is None:
            raise UserError(f'There is no image in "{pattern}": give files, a folder or a pattern.')
    files = (file for pattern in patterns for file in _match(pattern))
    return (Item(str(file), lambda file=file: open_image(file, str(file))) for file in files)


def _match(pattern: str) -> Iterator[Path]:
    """Yield files named directly, and those in folders whose extension or content is an image's."""
    paths = [pattern] if Path(pattern).exists() else glob.iglob(pattern, recursive=True)
    for path in map(Path, paths):
        # Sorted per folder; a list of millions of files would not fit in memory.
        for file in walk(path) if path.is_dir() else [path]:
            is_named = file == path or file.suffix.lower() in IMAGES
            if not file.is_dir() and (is_named or is_image(Path(), file)):
                yield file


def split_images(data: DataArguments, split: str) -> Iterator[Item]:
    """Yield the images of a dataset's split, named by split and row."""
    splits = load_raw(data)
    if split not in splits:
        raise UserError(f'"{data.dataset}" has no {split} split, only {", ".join(splits)}.')
    for row in splits[split].cast_column("image", ImageFeature(decode=False)):
        name = f"{split}/{row['row']}"
        yield Item(name, lambda cell=row["image"], name=name: open_image(cell, name))


def predict_to_file(
    model_name: str,
    items: Iterable[Item],
    output: Path,
    top_k: int = 3,
    batch_size: int = 64,
) -> dict:
    """Classify images and write a table, which appears complete or not at all.

    Its columns are `image`, `label_1`, `probability_1` and so on for `top_k` classes,
    `ood_score` and `is_ood` (empty if the model has no known evaluation), and `error`, the
    reason why an image could not be read.

    Args:
        model_name: A local folder, or `id@revision` on the Hub.
        items: The images.
        output: A path that ends in .csv or .parquet.
        top_k: How many classes to list, at most all of them.
        batch_size: Images per batch on the device.

    Returns:
        The counts `images`, `unreadable` and `ood`, and the `first` rows.

    Raises:
        UserError: The model or the output can't be used.
    """
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    if output.suffix not in WRITERS:
        raise UserError(f'The output file is "{output}"; it must end in .csv or .parquet.')
    model, processor = load_model(model_name)
    detector = ood.load_detector(model_name)
    device = runs.device()
    model = model.to(device)
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    size, resample, crop = input_size(processor), processor.resample, processor.do_center_crop
    top_k = min(top_k, len(names))

    def prepare(item: Item) -> np.ndarray | UserError:  # uint8 (S, S, 3)
        try:
            return np.asarray(fit_image(item.open(), size, resample, bool(crop)))
        except UserError as error:
            return error

    def predict(pixels: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits float32 (B, C), and scores (B,) if there is a detector."""
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(device)  # (B, 3, S, S)
        with torch.inference_mode():
            output = model(preprocess(images, processor), output_hidden_states=bool(detector))
        logits = output.logits.float().cpu()
        if not detector:
            return logits, None
        return logits, detector.score(logits, pool_layer(output, ood.DEPTH).cpu())

    counts, first = {"images": 0, "unreadable": 0, "ood": 0}, []
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(output.name + ".part")
    bar = tqdm(desc="Predicting", unit=" images")
    with (
        ThreadPoolExecutor(torch.get_num_threads()) as pool,
        WRITERS[output.suffix](part, _schema(top_k)) as writer,
    ):
        for batch in _prepare_ahead(items, prepare, pool, batch_size):
            rows = [
                {"image": item.name, "error": str(image) if isinstance(image, UserError) else None}
                for item, image in batch
            ]
            readable = [row for row in rows if row["error"] is None]
            images = [image for _, image in batch if not isinstance(image, UserError)]
            logits, scores = predict(images) if images else (torch.empty(0, len(names)), None)
            probs, classes = (x.tolist() for x in logits.softmax(dim=1).topk(top_k))  # (B, top_k)
            for i, row in enumerate(readable):
                for k in range(top_k):
                    row[f"label_{k + 1}"] = names[classes[i][k]]
                    row[f"probability_{k + 1}"] = probs[i][k]
                if scores is not None:
                    row["ood_score"] = scores[i].item()
                    row["is_ood"] = row["ood_score"] < detector.threshold
            table = pa.RecordBatch.from_pylist(rows, schema=_schema(top_k))
            writer.write_batch(table)
            first = first or table.slice(0, FIRST).to_pylist()
            counts["images"] += len(batch)
            counts["unreadable"] += len(batch) - len(images)
            counts["ood"] += sum(row.get("is_ood", False) for row in readable)
            bar.update(len(batch))
    bar.close()
    part.replace(output)
    return counts | {"first": first}


def _schema(top_k: int) -> pa.Schema:
    classes = [
        column
        for k in range(1, top_k + 1)
        for column in ((f"label_{k}", pa.string()), (f"probability_{k}", pa.float32()))
    ]
    return pa.schema(
        [("image", pa.string()), *classes, ("ood_score", pa.float32()), ("is_ood", pa.bool_()),
         ("error", pa.string())]
    )  # fmt: skip


def _prepare_ahead(items: Iterable[Item], prepare, pool: ThreadPoolExecutor, size: int) -> Iterator:
    """Yield batches of pairs (item, prepared), while the next batch is being prepared."""
    items, ready = iter(items), []
    while batch := list(islice(items, size)):
        coming = [(item, pool.submit(prepare, item)) for item in batch]
        if ready:
            yield [(item, future.result()) for item, future in ready]
        ready = coming
    if ready:
        yield [(item, future.result()) for item, future in ready]
