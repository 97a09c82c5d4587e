"""Small real things to test with."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

ROOT = Path(__file__).parents[2]
SMALL_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
}


def image_processor(size: int = 32, resample: int = 2, crop: bool = False) -> ViTImageProcessorPil:
    """Return a model's image processor, which squashes images to a square or crops their center."""
    square = {"height": size, "width": size}
    options = {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square}
    return ViTImageProcessorPil(resample=resample, **(options if crop else {"size": square}))


def draw_image(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """Return an RGB image of random pixels; `size` is width and height."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def run_script(monkeypatch, main: Callable[[], None], *args: str) -> None:
    """Call a script's `main` with a command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["script", *args])
    main()
