"""transformers' image-classification example, as it is commonly run.

As in its `run_image_classification.py` and its guide, each image is decoded, cropped, flipped and
normalized individually in `with_transform`, and the stock `Trainer` trains in float32 with its
default optimizer, learning rate and schedule. Crop and flip follow torchvision, but use Pillow.
"""

import random
from collections.abc import Callable

from datasets import Dataset
from PIL import Image, ImageOps
from transformers import Trainer, TrainingArguments

from benchmarks.machine import DEVICE
from pipeline.recipe import ModelArguments
from pipeline.runs import has_fast_bfloat16
from pipeline.training.model import build_model, build_processor

# From the guide. The `Trainer`'s defaults (8 images, no warm-up) destroyed pretrained features.
GUIDE = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "warmup_steps": 0.1}
# Lossless speedups of the stock `Trainer`. On a CPU, data workers would share its cores.
TUNED = {"bf16": True} if has_fast_bfloat16() else {}
WORKERS = {"dataloader_num_workers": 8, "dataloader_persistent_workers": True}
TUNED |= {"torch_compile": True, **WORKERS} if DEVICE.type != "cpu" else {}
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # as in torchvision's RandomResizedCrop


def build_trainer(dataset: Dataset, model: str, image_size: int, settings: dict) -> Trainer:
    """Build the stock `Trainer` for a pretrained model and the columns `image` and `label`."""
    arguments = ModelArguments(model=model, image_size=image_size, attention="sdpa")
    labels, processor = dataset.features["label"].names, build_processor(arguments)
    args = TrainingArguments(
        "example", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, dataloader_drop_last=True,
        use_cpu=DEVICE.type == "cpu", **settings,
    )  # fmt: skip
    train_set = dataset.with_transform(transform(processor))
    network = build_model(arguments, labels)
    return Trainer(network, args, train_dataset=train_set, processing_class=processor)


def transform(processor, augment: bool = True) -> Callable[[dict], dict]:
    """Return a function from PIL images to `pixel_values`, a list of float32 (3, S, S)."""
    size = (processor.size["width"], processor.size["height"])

    def apply(batch: dict) -> dict:
        images = [image.convert("RGB") for image in batch["image"]]
        if augment:
            images = [random_crop(image, size) for image in images]
            images = [ImageOps.mirror(i) if random.random() < 0.5 else i for i in images]
        pixels = processor(images, do_resize=not augment, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": batch["label"]}

    return apply


def random_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Crop a random area and aspect ratio, and resize it to `size`, (width, height)."""
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(*SCALE)
        ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** random.random()  # uniform on a log scale
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return image.resize(size, Image.BILINEAR, box=(left, top, left + w, top + h))
    return image.resize(size, Image.BILINEAR)
