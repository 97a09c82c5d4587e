"""Attention figures for chosen images, and how faithful the maps are on many."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps

from pipeline import attention, faithfulness, figures
from pipeline.data import Batches
from pipeline.errors import UserError
from pipeline.preprocess import preprocess

BATCH = 16  # bounds the memory: a ViT-B's attentions take 22 MB an image at 224 px
SHEET = 24  # images on the overview sheet at most


@dataclass
class Picture:
    """One image to explain; `truth` is its true label, where it is known."""

    name: str
    source: Image.Image | Path
    truth: str | None = None

    def read(self) -> Image.Image:
        """Upright and in RGB; UserError for a file that can't be read."""
        if isinstance(self.source, Image.Image):
            return self.source
        try:
            return ImageOps.exif_transpose(Image.open(self.source)).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"Cannot read the image {self.source}: {error}") from None


def typical_rows(labels: list[int], predictions: list[int], confidences: list[float]) -> list[int]:
    """The first image of each class that is told right, and the six surest mistakes."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    right = labels == predictions
    first = [np.flatnonzero(right & (labels == c))[:1] for c in np.unique(labels)]
    wrong = np.flatnonzero(~right)
    surest = wrong[np.argsort(-np.asarray(confidences)[wrong], kind="stable")[:6]]
    return [*np.concatenate(first).tolist(), *surest.tolist()]


def from_rows(dataset: Dataset, rows: list[int]) -> list[Picture]:
    """Images of a decoded split by their numbers; UserError for a number it has not."""
    names = dataset.features["label"].names
    for row in rows:
        if not 0 <= row < len(dataset):
            raise UserError(f"There is no row {row}: the split has {len(dataset)}, from 0.")
    batch = Batches(dataset).__getitems__(rows) if rows else {"pixel_values": [], "labels": []}
    return [
        Picture(
            f"{row:05}_{_file_name(names[label])}",
            Image.fromarray(pixels.permute(1, 2, 0).numpy()),
            names[label],
        )
        for row, pixels, label in zip(rows, batch["pixel_values"], batch["labels"], strict=True)
    ]


def from_files(paths: list[Path]) -> list[Picture]:
    """Images from files; UserError names one that can't be read, before any is drawn."""
    pictures = [Picture(_file_name(path.stem), path) for path in paths]
    for picture in pictures:
        picture.read()  # to know, not to keep: memory does not grow with their number
    return pictures


def draw(
    model,
    processor,
    pictures: list[Picture],
    folder: Path,
    layer: int,
    head: int,
    target: str | None,
) -> list[Path]:
    """Draw each picture's maps into `folder`, and an overview of the first; returns the files.

    `layer` and `head` are those of the single maps, `target` the class of the relevance (by
    name or number; default: the predicted one). UserError for one that is not there.
    """
    if not pictures:
        raise UserError("No image is chosen: name files or rows, or leave both out.")
    labels = model.config.id2label
    wanted = None if target is None else _class_number(target, labels)
    sheet, files = [], []
    for batch in _batches(pictures):
        images = [picture.read() for picture in batch]
        try:
            maps = attention.explain(model, _pixels(images, processor).to(model.device), wanted)
            maps.select("head", layer, head)  # refuses a wrong layer or head
        except ValueError as error:
            raise UserError(str(error)) from None
        for i, (picture, image) in enumerate(zip(batch, images, strict=True)):
            title = _title(maps.logits[i], labels, picture.truth)
            panels = _panels(maps, i, image, labels, layer)
            for kind, overlays in panels.items():
                path = folder / f"{picture.name}_{kind}.png"
                figures.attention_panels(overlays, title, path, attention.COLORS)
                files.append(path)
            if len(sheet) < SHEET:
                (_, plain), last = panels["overlay"]
                methods = [panels["heads"][head], panels["rollout"][1], panels["relevance"][1]]
                sheet.append([(title, plain), last, *methods])
    path = folder / "overview.png"
    figures.attention_sheet(sheet, path, attention.COLORS)
    return [*files, path]


def measure(model, processor, dataset: Dataset, count: int, head: int, seed: int = 0) -> dict:
    """Faithfulness of each method on `count` images of a decoded split, drawn by `seed`.

    See `faithfulness.summary`; with the mean `curves`, one value a step.
    """
    if not 0 < count <= len(dataset):
        raise UserError(f"Faithfulness wants 1 to {len(dataset)} images; {count} were asked for.")
    rows = np.sort(np.random.default_rng(seed).choice(len(dataset), count, replace=False))
    batches, generator = Batches(dataset), torch.Generator().manual_seed(seed)
    parts: dict[str, dict[str, list]] = {}
    for chunk in _batches(rows.tolist()):
        images = batches.__getitems__(chunk)["pixel_values"].to(model.device)
        try:
            found = faithfulness.curves(model, preprocess(images, processor), head, generator)
        except ValueError as error:
            raise UserError(str(error)) from None
        for method, kinds in found.items():
            for kind, curve in kinds.items():
                parts.setdefault(method, {}).setdefault(kind, []).append(curve.cpu().numpy())
    curves = {m: {k: np.concatenate(v) for k, v in kinds.items()} for m, kinds in parts.items()}
    areas = {m: {k: faithfulness.area(v) for k, v in kinds.items()} for m, kinds in curves.items()}
    return {
        "images": count,
        "seed": seed,
        "head": head,
        "methods": faithfulness.summary(areas, seed),
        "curves": {
            m: {k: v.mean(axis=0).tolist() for k, v in kinds.items()} for m, kinds in curves.items()
        },
    }


def _panels(
    maps: attention.Maps, i: int, image: Image.Image, labels: dict[int, str], layer: int
) -> dict[str, list[tuple[str, Image.Image]]]:
    """The overlays of image i, with their captions, by kind of figure."""

    def laid(caption: str, values: torch.Tensor) -> tuple[str, Image.Image]:
        return caption, attention.overlay(image, values.cpu().numpy())

    plain = ("", attention.fitted(image))
    number = range(maps.heads.shape[1])[layer]  # -1 as the last
    about = labels[int(maps.classes[i])]
    return {
        "overlay": [plain, laid(f"layer {number}", maps.select("mean", layer)[i])],
        "layers": [laid(f"layer {n}", m) for n, m in enumerate(maps.heads[i].mean(dim=1))],
        "heads": [laid(f"head {n}", m) for n, m in enumerate(maps.heads[i, layer])],
        "rollout": [plain, laid("rollout", maps.rollout[i])],
        "relevance": [plain, laid(f"relevance for {about}", maps.relevance[i])],
    }


def _title(logits: torch.Tensor, labels: dict[int, str], truth: str | None) -> str:
    chances = logits.softmax(dim=0)
    guess = int(chances.argmax())
    title = f"{labels[guess]}, {chances[guess]:.1%}"
    return title if truth is None else f"{title}\ntrue: {truth}"


def _pixels(images: list[Image.Image], processor) -> torch.Tensor:
    """float (B, 3, S, S); one by one, since files differ in size."""
    tensors = [torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] for image in images]
    return torch.cat([preprocess(tensor, processor) for tensor in tensors])


def _batches(items: list) -> Iterator[list]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def _class_number(target: str, labels: dict[int, str]) -> int:
    for number, label in labels.items():
        if target in (label, str(number)):
            return number
    raise UserError(f'There is no class "{target}"; there are {", ".join(labels.values())}.')


def _file_name(text: str) -> str:
    return re.sub(r"[^\w-]+", "_", text)
