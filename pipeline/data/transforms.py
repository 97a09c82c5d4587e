"""Resize, augment, normalize and mix whole batches of uint8 images on the device.

The resize matches Pillow exactly, so that `transformers.pipeline()`, which resizes with Pillow,
gives the published model the same pixels as in training.

- Horizontal flip and padded random crop: He et al. 2016, "Deep Residual Learning", section 4.2.
- Mixup: Zhang et al. 2018, arXiv:1710.09412. CutMix: Yun et al. 2019, arXiv:1905.04899.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.Image import Resampling
from torch import Tensor

from pipeline.errors import UserError

# Pillow's filters, keyed by an image processor's `resample`: (half width in pixels, function).
FILTERS = {
    Resampling.BOX: (0.5, lambda x: ((x > -0.5) & (x <= 0.5)).to(x.dtype)),
    Resampling.BILINEAR: (1.0, lambda x: (1 - x.abs()).clamp(min=0)),
    Resampling.BICUBIC: (2.0, lambda x: _cubic(x.abs())),
    Resampling.HAMMING: (1.0, lambda x: torch.sinc(x) * (0.54 + 0.46 * (x * torch.pi).cos())),
    Resampling.LANCZOS: (3.0, lambda x: torch.sinc(x) * torch.sinc(x / 3) * (x.abs() < 3)),
}
PRECISION_BITS = 22  # Pillow's fixed-point weights for 8-bit images
CHUNK = 8  # images


def preprocess(images: Tensor, processor, size: int | None = None) -> Tensor:
    """Apply an image processor's steps to a whole batch on its device.

    Args:
        images: uint8 (B, 3, H, W), returned as float32 (B, 3, S, S).
        processor: One that `training.processor` reproduces.
        size: S, in pixels; the processor's by default.
    """
    processor_size, resample, crop = resize_options(processor)
    size = size or processor_size
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (0.0,) * 3, (1.0,) * 3
    if processor.do_normalize:
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    mean, std = _by_channel(mean, images.device), _by_channel(std, images.device)
    is_bgr = getattr(processor, "do_flip_channel_order", False)  # MobileViT's
    pixels = torch.empty(len(images), 3, size, size, device=images.device)
    # On a CPU, process a few images at a time, so that they stay in its cache between steps.
    step = CHUNK if images.device.type == "cpu" else max(len(images), 1)
    for part, target in zip(images.split(step), pixels.split(step), strict=True):
        resized = resize(part, size, resample, crop)
        target.copy_(resized.flip(1) if is_bgr else resized)
        target.mul_(factor).sub_(mean).div_(std)
    return pixels


def input_size(processor) -> int:
    """Return the side, in pixels, of an image processor's square output."""
    return (processor.crop_size if processor.do_center_crop else processor.size)["height"]


def resize_options(processor) -> tuple[int, int, bool]:
    """Return the arguments of `resize` and `fit_image`: size, Pillow filter, whether to crop."""
    return input_size(processor), processor.resample, bool(processor.do_center_crop)


def fit_image(image: Image.Image, size: int, resample: int, crop: bool = False) -> Image.Image:
    """Resize one image as `resize` does a batch; `resize` does not change the result further."""
    rows, columns, top, left = _placement(image.height, image.width, size, crop)
    return image.resize((columns, rows), resample).crop((left, top, left + size, top + size))


def visible_part(image: Image.Image, processor) -> Image.Image:
    """Return the part of an image that the model sees: all of it, or the center square crop."""
    if not processor.do_center_crop:
        return image
    return ImageOps.fit(image, (min(image.size),) * 2, Resampling.NEAREST)


def augment(
    images: Tensor, horizontal_flip: bool, random_crop_padding: float, generator: torch.Generator
) -> Tensor:
    """Randomly augment a batch, returned as uint8 (B, 3, H, W).

    Args:
        images: The batch, uint8 (B, 3, H, W).
        horizontal_flip: Mirror each image left to right with probability 1/2.
        random_crop_padding: Shift each image by up to this share of its side; the border is filled
            by reflection. 0.125 is the usual 4 pixels of a 32-pixel image.
        generator: A generator on the device of the images.
    """
    batch, _, height, width = images.shape
    device = images.device

    def source_index(size: int) -> Tensor:  # (B, size): the source of each target row or column
        reach = round(size * random_crop_padding)
        shift = torch.randint(-reach, reach + 1, (batch, 1), device=device, generator=generator)
        index = (torch.arange(size, device=device) + shift).abs()
        return torch.where(index >= size, 2 * (size - 1) - index, index)

    if random_crop_padding:
        rows, columns = source_index(height)[:, :, None], source_index(width)[:, None, :]
        # Indexing puts the channels last: (B, H, W, 3) back to (B, 3, H, W).
        image = torch.arange(batch, device=device)[:, None, None]
        images = images[image, :, rows, columns].permute(0, 3, 1, 2)
    if horizontal_flip:
        is_flipped = torch.rand(batch, device=device, generator=generator) < 0.5
        images = torch.where(is_flipped[:, None, None, None], images.flip(-1), images)
    return images


def resize(images: Tensor, size: int, resample: int, crop: bool = False) -> Tensor:
    """Resize to a square, bit-identical to Pillow. uint8 (B, 3, H, W) to (B, 3, size, size).

    Resizes the whole image, or with `crop` the shortest edge before cropping the center.
    """
    # Separable: along the width first, rounded to 8 bits in between, as in Pillow.
    # float64 represents the products of 8-bit pixels and 22-bit weights exactly.
    dtype = torch.float32 if images.device.type == "mps" else torch.float64
    height, width = images.shape[-2:]
    rows, columns, top, left = _placement(height, width, size, crop)
    if width != columns:
        weights = resize_weights(width, columns, resample, images.device, dtype)[left : left + size]
        images = _round_to_uint8(images.to(dtype) @ weights.T)  # (B, 3, H, S)
    else:
        images = images[..., left : left + size]
    if height != rows:
        weights = resize_weights(height, rows, resample, images.device, dtype)[top : top + size]
        return _round_to_uint8(weights @ images.to(dtype))  # (B, 3, S, S)
    return images[..., top : top + size, :]


@lru_cache(maxsize=16)  # copying to the device on each call would stall its queue
def resize_weights(
    size: int, new_size: int, resample: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the weight of each source pixel in each target pixel, (new_size, size), on the device.

    As in Pillow's `precompute_coeffs`, the filter is widened when shrinking (antialiasing), cut
    at the border, normalized, and rounded to `PRECISION_BITS`. UserError for an unknown filter.
    """
    scale = size / new_size
    if resample == Resampling.NEAREST:
        centers = np.cumsum([scale / 2] + [scale] * (new_size - 1))  # a running sum, as in Pillow
        return F.one_hot(torch.from_numpy(centers.astype(int)), size).to(device, dtype)
    if resample not in FILTERS:
        raise UserError(f"The image processor's resample is {resample}; choose from 0 to 5.")
    half_width, function = FILTERS[resample]
    stretch = max(scale, 1.0)
    center = (torch.arange(new_size, dtype=torch.float64)[:, None] + 0.5) * scale  # (S, 1)
    source = torch.arange(size, dtype=torch.float64)[None, :]  # (1, W)
    first = (center - half_width * stretch + 0.5).trunc()
    last = (center + half_width * stretch + 0.5).trunc()
    weights = function((source - center + 0.5) / stretch)
    weights = torch.where((source >= first) & (source < last), weights, 0.0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    fixed = weights * 2**PRECISION_BITS
    rounded = (fixed + 0.5 * fixed.sign()).trunc() / 2**PRECISION_BITS
    return rounded.to(device, dtype)


@lru_cache(maxsize=16)
def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)[:, None, None]  # (3, 1, 1)


def mix(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    mixup: float,
    cutmix: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Mix a batch with its reverse by mixup or CutMix; choose one at random if both are on.

    Args:
        images: float (B, 3, S, S), returned mixed.
        labels: int64 (B,), returned as soft labels, float (B, num_classes).
        num_classes: The model's number of classes.
        mixup: Parameter of the Beta distribution for mixup; 0 is off.
        cutmix: Parameter of the Beta distribution for CutMix; 0 is off.
        generator: A generator on the CPU.
    """
    # PyTorch's Beta distribution takes no generator.
    random = np.random.default_rng(torch.randint(2**62, (), generator=generator).item())
    use_cutmix = cutmix > 0 and (mixup == 0 or random.random() < 0.5)
    alpha = cutmix if use_cutmix else mixup
    share = random.beta(alpha, alpha)  # the original image's share
    if use_cutmix:
        size = images.shape[-1]
        side = round(size * (1 - share) ** 0.5)
        top, left = random.integers(size - side + 1, size=2)
        images = images.clone()
        box = (..., slice(top, top + side), slice(left, left + side))
        images[box] = images.flip(0)[box]
        share = 1 - (side / size) ** 2
    else:
        images = images.lerp(images.flip(0), 1 - share)
    soft = F.one_hot(labels, num_classes).to(images.dtype)
    return images, soft.lerp(soft.flip(0), 1 - share)


def _placement(height: int, width: int, size: int, crop: bool) -> tuple[int, int, int, int]:
    """Return the resized image's rows and columns, and the top and left of the square in it."""
    if not crop:
        return size, size, 0, 0
    rows, columns = (int(size * side / min(height, width)) for side in (height, width))
    return rows, columns, (rows - size) // 2, (columns - size) // 2


def _cubic(x: Tensor, a: float = -0.5) -> Tensor:
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _round_to_uint8(values: Tensor) -> Tensor:
    # In place, since the tensor is large; the conversion truncates, which rounds down here.
    return values.add_(0.5).clamp_(0, 255).to(torch.uint8)
