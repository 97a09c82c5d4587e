"""The other side of the benchmark: fine-tuning as the widely copied example scripts do it.

After transformers' `examples/pytorch/image-classification` and its image classification guide:
each image is decoded, cropped, flipped and normalised by itself in a `with_transform`, and the
stock `Trainer` trains in float32 with its default optimizer, learning rate and schedule, warmed
up. Crop and flip are torchvision's, by Pillow. `tuned` turns on what makes it faster at no loss.
"""

import random
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image, ImageOps
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor

# The guide's: 64 images a step, warmed up. Batches of 8 with no warm-up, the `Trainer`'s own, made
# a backbone lose what it knew: see docs/performance.md.
BATCH, ACCUMULATION, WARMUP = 16, 4, 0.1
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of torchvision's RandomResizedCrop


def build_trainer(
    dataset: Dataset,
    model: torch.nn.Module,
    processor: BaseImageProcessor,
    batch_size: int,
    max_steps: int,
    folder: Path,
    tuned: bool,
    accumulation: int = 1,
) -> Trainer:
    """Ready to train on columns `image` (decoded as they are read) and `label`."""
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            warmup_steps=WARMUP,  # below 1: a share of all steps
            max_steps=max_steps,
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_drop_last=True,  # every step counts as many images
            use_cpu=not torch.accelerator.is_available(),
            **(fast_settings() if tuned else {}),
        ),
        train_dataset=dataset.with_transform(train_transform(processor)),
        data_collator=collate,
        processing_class=processor,
    )


def fast_settings() -> dict:
    """What makes the stock `Trainer` faster at no loss, where this machine has it."""
    from pipeline.environment import fast_bfloat16

    if not torch.accelerator.is_available():
        return {"bf16": fast_bfloat16()}  # workers would share the cores that train
    return {
        "bf16": True,
        "torch_compile": True,
        "dataloader_num_workers": 8,
        "dataloader_persistent_workers": True,
    }


def load_backbone(folder: str, labels: list[str]) -> torch.nn.Module:
    return AutoModelForImageClassification.from_pretrained(
        folder,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )


def train_transform(processor: BaseImageProcessor):
    """A batch's PIL images to `pixel_values`, float32 (3, S, S) each, and `labels`."""
    size = (processor.size["width"], processor.size["height"])

    def transform(batch: dict) -> dict:
        images = [random_flip(random_crop(i.convert("RGB"), size)) for i in batch["image"]]
        pixels = processor(images, do_resize=False, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": batch["label"]}

    return transform


def test_transform(processor: BaseImageProcessor):
    """As `train_transform`, of whole images."""

    def transform(batch: dict) -> dict:
        images = [image.convert("RGB") for image in batch["image"]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": batch["label"]}

    return transform


def random_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A part of random area and shape, resized to `size`."""
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(*SCALE)
        ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** random.random()  # even on a log scale
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return image.resize(size, Image.BILINEAR, box=(left, top, left + w, top + h))
    return image.resize(size, Image.BILINEAR)


def random_flip(image: Image.Image) -> Image.Image:
    return ImageOps.mirror(image) if random.random() < 0.5 else image


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }
