"""Image processors that `transforms.preprocess` reproduces exactly."""

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.models.mobilevit.image_processing_pil_mobilevit import MobileViTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from pipeline.data.transforms import preprocess
from pipeline.errors import UserError

PROBES = ((0, 0, 0), (255, 255, 255), (200, 90, 20))  # colors that distinguish color conversions


def plain_processor(source: PilBackend, size: int, crop: bool, name: str) -> PilBackend:
    """Return a processor that converts colors and resamples as `source` does.

    Args:
        source: A checkpoint's image processor. Its resizing, cropping and padding are replaced.
        size: Side of the output, in pixels.
        crop: Resize the shortest edge and crop the center, instead of resizing the whole image.
        name: The checkpoint's name, for an error.

    Raises:
        UserError: The color conversion can't be reproduced.
    """
    square = {"height": size, "width": size}
    options = {"size": square, "resample": int(source.resample)}
    if crop:
        options |= {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square}
    mean, std = (source.image_mean, source.image_std) if source.do_normalize else (0.0, 1.0)
    wanted = _colors(source)
    black, white = wanted[:2]
    scale = np.where(white > black, white - black, 1.0)
    candidates = (
        ViTImageProcessorPil(
            **options,
            image_mean=np.broadcast_to(mean, 3).tolist(),
            image_std=np.broadcast_to(std, 3).tolist(),
            rescale_factor=source.rescale_factor,
        ),
        # Any linear step per channel (no rescaling, an offset) is a normalization.
        ViTImageProcessorPil(
            **options, image_mean=(-black / scale).tolist(), image_std=(1 / scale).tolist()
        ),
        MobileViTImageProcessorPil(**options | {"do_center_crop": crop}),  # BGR, not normalized
    )
    for processor in candidates:
        if np.allclose(_colors(processor), wanted, rtol=1e-5, atol=1e-4):
            return processor
    raise UserError(
        f'The image processor of "{name}", {type(source).__name__}, changes colors in a way that '
        "this pipeline does not reproduce: choose another backbone."
    )


def is_reproduced(processor: PilBackend) -> bool:
    """Return whether `preprocess` equals the processor on a wide and a tall image."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    for pixels in (noise, noise.transpose(1, 0, 2)):
        try:
            ours = preprocess(torch.tensor(pixels).permute(2, 0, 1)[None], processor)
            theirs = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            return False  # an unsupported size or output format
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-4):
            return False
    return True


def _colors(processor: PilBackend) -> np.ndarray:
    """Return a processor's output at the center of single-color images, (3, channels)."""
    colors = []
    for color in PROBES:
        image = Image.new("RGB", (32, 32), color)
        pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
        if pixels.ndim == 2:  # SigLIP 2 NaFlex gives patches (N, P*P*3)
            colors.append(pixels[0, :3])
        else:
            colors.append(pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2])
    return np.array(colors)
