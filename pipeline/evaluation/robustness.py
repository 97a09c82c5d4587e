"""Accuracy under common corruptions (Hendrycks & Dietterich 2019, arXiv:1903.12261).

The corruptions and their five severities are those of CIFAR-10-C for images of up to SMALL pixels,
and of ImageNet-C for larger ones. They are computed for whole batches on the device, except JPEG
compression, which uses Pillow.
"""

import io
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from torch import Generator, Tensor

from pipeline.data.transforms import resize_weights

SMALL = 64  # pixels, maximum of the longer side
# The parameter of each severity, for CIFAR-10-C and for ImageNet-C.
PARAMETERS = {
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.1), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": ((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": ((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": ((0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": ((0.4, 0.6, 0.7, 0.8, 1), (1, 2, 3, 4, 6)),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}


def measure_robustness(run: Callable[..., tuple], device: torch.device, dataset: Dataset) -> dict:
    """Measure the accuracy of a model under each corruption and severity.

    Args:
        run: `predict` for one model, called with a decoded dataset.
        device: The device that it runs on.
        dataset: A decoded split.

    Returns:
        `accuracy`, five values per corruption; their `mean_accuracy`, with its 95 % interval
        over images; the number of `images`.
    """
    accuracy, correct = {}, []
    for name in PARAMETERS:
        generator, accuracy[name] = Generator(device).manual_seed(0), []
        for severity in range(1, 6):
            options = {"name": name, "severity": severity, "generator": generator}
            logits, labels, *_ = run(dataset, transform=partial(corrupt, **options))
            correct.append((logits.argmax(dim=1) == labels).numpy())
            accuracy[name].append(float(correct[-1].mean()))
    by_image = np.mean(correct, axis=0)  # (N,)
    mean, reach = float(by_image.mean()), float(1.96 * by_image.std() / len(by_image) ** 0.5)
    interval = {"mean_accuracy_interval": [max(0.0, mean - reach), min(1.0, mean + reach)]}
    return {"accuracy": accuracy, "mean_accuracy": mean, "images": len(by_image)} | interval


def corrupt(images: Tensor, name: str, severity: int, generator: Generator) -> Tensor:
    """Corrupt a batch, returned as uint8 (B, 3, H, W).

    Args:
        images: The batch, uint8 (B, 3, H, W).
        name: A key of PARAMETERS.
        severity: 1 to 5.
        generator: A generator on the device of the images.
    """
    value = PARAMETERS[name][max(images.shape[-2:]) > SMALL][severity - 1]
    if name in ON_UINT8:
        return ON_UINT8[name](images, value)
    pixels = ON_FLOAT[name](images.float() / 255, value, generator)
    return (pixels.clamp(0, 1) * 255).to(torch.uint8)  # rounded down, as in the reference code


def _normal(x: Tensor, generator: Generator) -> Tensor:
    return torch.empty_like(x).normal_(generator=generator)


def _impulse_noise(x: Tensor, amount: float, generator: Generator) -> Tensor:
    draws = torch.empty_like(x).uniform_(generator=generator)
    return torch.where(draws < amount / 2, 0.0, torch.where(draws < amount, 1.0, x))


def _gaussian_blur(x: Tensor, sigma: float, generator: Generator) -> Tensor:
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = (-0.5 * (offsets / sigma) ** 2).exp()
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)  # one for each channel
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0), mode="replicate"), kernel, groups=3)
    padded = F.pad(x, (0, 0, radius, radius), mode="replicate")
    return F.conv2d(padded, kernel.transpose(2, 3), groups=3)


def _brightness(x: Tensor, shift: float, generator: Generator) -> Tensor:
    # Raise the HSV value at the same hue and saturation: scale all channels by one factor.
    value = x.amax(dim=1, keepdim=True)  # (B, 1, H, W)
    raised = (value + shift).clamp(0, 1)
    return torch.where(value > 0, x * raised / value.clamp(min=1e-6), raised)


def _contrast(x: Tensor, factor: float, generator: Generator) -> Tensor:
    mean = x.mean(dim=(2, 3), keepdim=True)
    return (x - mean) * factor + mean


def _pixelate(images: Tensor, factor: float) -> Tensor:
    height, width = images.shape[-2:]
    for rows, columns in ((int(height * factor), int(width * factor)), (height, width)):
        options = (Image.Resampling.BOX, images.device, torch.float32)
        across = resize_weights(images.shape[-1], columns, *options)
        down = resize_weights(images.shape[-2], rows, *options)
        images = (images.float() @ across.T + 0.5).floor()  # rounded after each axis, as in Pillow
        images = (down @ images + 0.5).floor()
    return images.to(torch.uint8)


def _jpeg_compression(images: Tensor, quality: int) -> Tensor:
    decoded = []
    for pixels in images.permute(0, 2, 3, 1).cpu().numpy():  # (H, W, 3)
        Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(images.device)


ON_FLOAT = {
    "gaussian_noise": lambda x, scale, g: x + scale * _normal(x, g),
    "shot_noise": lambda x, rate, g: torch.poisson(x * rate, g) / rate,
    "impulse_noise": _impulse_noise,
    "speckle_noise": lambda x, scale, g: x + x * scale * _normal(x, g),
    "gaussian_blur": _gaussian_blur,
    "brightness": _brightness,
    "contrast": _contrast,
}
ON_UINT8 = {"pixelate": _pixelate, "jpeg_compression": _jpeg_compression}
