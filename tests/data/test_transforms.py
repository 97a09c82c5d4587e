import numpy as np
import pytest
import torch
from PIL import Image
from PIL.Image import Resampling
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from pipeline.data.transforms import (
    augment,
    fit_image,
    mix,
    preprocess,
    resize,
)
from pipeline.errors import UserError
from samples import draw_image


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("crop", [False, True], ids=["squash", "crop"])
@pytest.mark.parametrize("resample", list(Resampling), ids=lambda r: r.name.lower())
@pytest.mark.parametrize("size", [(32, 32), (91, 67), (224, 20), (48, 64)])
@pytest.mark.parametrize("target", [7, 32, 98])
def test_resize_is_pillows_bit_for_bit(resample, size, target, crop):
    images = [draw_image(seed, size) for seed in range(3)]
    ours = resize(torch.stack([as_tensor(i) for i in images]), target, resample, crop)
    theirs = torch.stack([as_tensor(fit_image(i, target, resample, crop)) for i in images])
    assert torch.equal(ours, theirs)
    if not crop:
        plain = torch.stack([as_tensor(i.resize((target, target), resample)) for i in images])
        assert torch.equal(ours, plain)
    assert torch.equal(resize(ours, target, resample, crop), ours)


def test_an_unknown_filter_is_refused():
    with pytest.raises(UserError, match="resample is 6; choose from 0 to 5"):
        resize(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 8, 6)


def test_preprocess_is_what_the_image_processor_does():
    processor = ViTImageProcessorPil(
        size={"height": 42, "width": 42}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.1]
    )
    images = [draw_image(seed, (32, 32)) for seed in range(4)]
    theirs = processor(images, return_tensors="pt")["pixel_values"]
    ours = preprocess(torch.stack([as_tensor(i) for i in images]), processor)
    assert ours.shape == (4, 3, 42, 42)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_flip_mirrors_about_half_of_the_images():
    images = torch.arange(1000 * 3 * 2 * 5).reshape(1000, 3, 2, 5)
    flipped = augment(images, True, 0.0, generator())
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 430 < same.sum() < 570


def test_crop_shifts_the_whole_image_and_reflects_the_border():
    image = torch.arange(64).reshape(1, 1, 8, 8).expand(500, 3, 8, 8)
    cropped = augment(image, False, 0.25, generator())
    assert cropped.shape == image.shape
    padded = torch.nn.functional.pad(image[:1].float(), (2, 2, 2, 2), mode="reflect").long()
    windows = {
        tuple(padded[0, 0, r : r + 8, c : c + 8].flatten().tolist())
        for r in range(5)
        for c in range(5)
    }
    seen = {tuple(i[0].flatten().tolist()) for i in cropped}
    assert seen == windows  # all 25 shifts, and nothing else


def test_augmentation_is_a_function_of_its_generator():
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    first, again, other = (augment(images, True, 0.125, generator(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.uint8


def test_mixup_mixes_images_and_labels_by_the_same_share():
    images = torch.zeros(2, 3, 4, 4)
    images[1] = 1
    mixed, soft = mix(images, torch.tensor([0, 1]), 3, mixup=0.5, cutmix=0, generator=generator())
    share = mixed[0, 0, 0, 0]
    assert 0 < share < 1
    torch.testing.assert_close(soft[0], torch.stack([1 - share, share, torch.tensor(0.0)]))
    torch.testing.assert_close(soft.sum(1), torch.ones(2))


def test_cutmix_labels_are_the_shares_of_the_pixels():
    images = torch.zeros(2, 3, 16, 16)
    images[1] = 1
    for seed in range(5):
        mixed, soft = mix(images, torch.tensor([0, 1]), 2, 0, cutmix=1.0, generator=generator(seed))
        assert set(mixed.unique().tolist()) <= {0.0, 1.0}
        torch.testing.assert_close(soft[0, 1], mixed[0].mean())
