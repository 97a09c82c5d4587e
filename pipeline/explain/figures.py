"""Draw the attention maps of selected images, and an overview sheet."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from pipeline import plots
from pipeline.data.decoding import DecodedImages, content_hash, open_image
from pipeline.data.transforms import preprocess, visible_part
from pipeline.errors import UserError
from pipeline.evaluation.outputs import predict
from pipeline.explain import attention

BATCH = 16  # images; limits memory: a ViT-B's attentions take 22 MB per image at 224 px
SHEET = 3  # maximum images on the overview, which a model card shows 700 px wide
ERRORS, CLASSES = 6, 20  # how many most confident errors to draw, and correct images


@dataclass
class Example:
    """One image to explain; `label` is its true label, if known."""

    name: str
    source: Image.Image | Path
    label: str | None = None

    @property
    def owner(self) -> str:
        """The owner of the image, for the manifest: "user" or "dataset"."""
        return "user" if isinstance(self.source, Path) else "dataset"

    def open(self) -> Image.Image:
        """Return the image upright and in RGB; UserError for a file that can't be read."""
        if isinstance(self.source, Image.Image):
            return self.source
        return open_image(self.source, f"The image {self.source}")


def select_examples(
    labels: list[int], predictions: list[int], confidences: list[float]
) -> list[int]:
    """Return the rows of the first correct image of a class and of the most confident errors.

    With many classes, only the first CLASSES are shown.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    correct = labels == predictions
    first = [np.flatnonzero(correct & (labels == c))[:1] for c in np.unique(labels)[:CLASSES]]
    errors = np.flatnonzero(~correct)
    by_confidence = np.argsort(-np.asarray(confidences)[errors], kind="stable")
    return [*np.concatenate(first).tolist(), *errors[by_confidence[:ERRORS]].tolist()]


def select_rows(model, processor, test: Dataset, results: dict | None, hashes: dict) -> list[int]:
    """Select examples from the results if they match these weights, otherwise by predicting.

    Args:
        model: An image classifier.
        processor: Its image processor.
        test: The decoded test split.
        results: The results of `evaluate`, if there are any.
        hashes: SHA-256 of the model's files.
    """
    if (
        results
        and results["model"]["sha256"] == hashes
        and results["dataset"]["sha256"] == content_hash(test)
    ):
        return select_examples(test["label"][:], results["predictions"], results["confidences"])
    logits, labels = predict(model, processor, test)
    confidences, predictions = logits.softmax(dim=1).max(dim=1)
    return select_examples(labels.tolist(), predictions.tolist(), confidences.tolist())


def examples_from_rows(dataset: Dataset, rows: list[int]) -> list[Example]:
    """Return images from a decoded split by row; UserError for a row that does not exist."""
    names = dataset.features["label"].names
    for row in rows:
        if not 0 <= row < len(dataset):
            raise UserError(f"There is no row {row}: choose from 0 to {len(dataset) - 1}.")
    batch = DecodedImages(dataset).batch(rows)
    return [
        Example(
            f"{row:05}_{_file_name(names[label])}",
            Image.fromarray(pixels.permute(1, 2, 0).numpy()),
            names[label],
        )
        for row, pixels, label in zip(rows, batch["pixel_values"], batch["labels"], strict=True)
    ]


def examples_from_files(paths: list[Path]) -> list[Example]:
    """Return images from files; UserError if one can't be read, before anything is drawn."""
    examples, names = [], set()
    for path in paths:
        name, number = _file_name(path.stem), 1
        while (unique := f"{name}_{number}" if number > 1 else name) in names:
            number += 1  # files of one name in several folders
        names.add(unique)
        examples.append(Example(unique, path))
    for example in examples:
        example.open()  # only a check: keeping the images would take memory
    return examples


def draw(
    model,
    processor,
    examples: list[Example],
    folder: Path,
    layer: int = -1,
    head: int = 0,
    target: str | None = None,
) -> dict[Path, str]:
    """Draw each example's maps, and an overview of a few examples.

    Args:
        model: An image classifier with attention maps.
        processor: Its image processor.
        examples: The images to draw.
        folder: The output folder; nothing is written before the first image is explained.
        layer: The layer of the single map, from 0; -1 is the last.
        head: The head of the single map, from 0.
        target: The target class of relevance; by default the predicted one.

    Returns:
        The files, the overview last, and the owner of each file's images: "user" or "dataset".

    Raises:
        UserError: A layer, head or class does not exist, or the model has no maps.
    """
    if not examples:
        raise UserError("No image is selected: give files or rows, or neither for a default.")
    labels = model.config.id2label
    numbers = {label: number for number, label in labels.items()}
    if target not in (None, *numbers):
        raise UserError(f'There is no class "{target}"; choose from {", ".join(labels.values())}.')
    shown = examples[:: -(-len(examples) // SHEET)]  # evenly: correct answers and errors
    sheet, files = [], {}
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        images = [example.open() for example in batch]
        try:
            pixels = _pixels(images, processor).to(model.device)
            maps = attention.compute_maps(model, pixels, numbers.get(target))
            maps.select("head", layer, head)  # raises for a wrong layer or head
            images = [visible_part(image, processor) for image in images]
        except ValueError as error:
            raise UserError(str(error)) from None
        for i, (example, image) in enumerate(zip(batch, images, strict=True)):
            title = _title(maps.logits[i], labels, example.label)
            panels = _panels(maps, i, image, labels, layer)
            for kind, overlays in panels.items():
                path = folder / f"{example.name}_{kind}.png"
                plots.image_sheet(overlays, 6, path, attention.COLORMAP, title)
                files[path] = example.owner
            if any(example is other for other in shown):
                (_, plain), *methods = panels["methods"]
                sheet += [(title, plain), *methods]
    path = folder / "overview.png"
    plots.image_sheet(sheet, 4, path, attention.COLORMAP)
    owners = {example.owner for example in shown}
    return files | {path: "user" if "user" in owners else "dataset"}


def _panels(
    maps: attention.Maps, i: int, image: Image.Image, labels: dict[int, str], layer: int
) -> dict[str, list[tuple[str, Image.Image]]]:
    """Return the overlays of image i, with captions, by type of figure."""

    def overlay(caption: str, values: torch.Tensor) -> tuple[str, Image.Image]:
        return caption, attention.overlay(image, values.cpu().numpy())

    plain = ("", attention.fit_size(image))
    number = range(maps.heads.shape[1])[layer]  # resolves -1 to the last
    target = labels[int(maps.classes[i])]
    return {
        "methods": [
            plain,
            overlay(f"layer {number}", maps.select("mean", layer)[i]),
            overlay("rollout", maps.rollout[i]),
            overlay(f"relevance for {target}", maps.relevance[i]),
        ],
        "layers": [overlay(f"layer {n}", m) for n, m in enumerate(maps.heads[i].mean(dim=1))],
        "heads": [overlay(f"head {n}", m) for n, m in enumerate(maps.heads[i, layer])],
    }


def _title(logits: torch.Tensor, labels: dict[int, str], label: str | None) -> str:
    probs = logits.softmax(dim=0)
    predicted = int(probs.argmax())
    confidence = "> 99.9%" if probs[predicted] > 0.999 else f"{probs[predicted]:.1%}"
    title = f"{labels[predicted]}, {confidence}"  # never 100 %
    return title if label is None else f"{title}\nlabel: {label}"


def _pixels(images: list[Image.Image], processor) -> torch.Tensor:
    """Return float (B, 3, S, S), preprocessed one by one, since image sizes differ."""
    tensors = [torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] for image in images]
    return torch.cat([preprocess(tensor, processor) for tensor in tensors])


def _file_name(text: str) -> str:
    return re.sub(r"[^\w-]+", "_", text)
