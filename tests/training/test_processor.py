import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from pipeline.data.transforms import fit_image, input_size, preprocess
from pipeline.errors import UserError
from pipeline.recipe import ModelArguments
from pipeline.training.model import build_processor, load_model
from pipeline.training.processor import is_reproduced, plain_processor
from samples import draw_image

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
# Steps on colors that checkpoints' image processors take.
SOURCES = {
    "plain": ViTImageProcessorPil(image_mean=MEAN, image_std=STD),
    "scalar mean": ViTImageProcessorPil(image_mean=0.4, image_std=0.3),
    "not normalized": ViTImageProcessorPil(do_normalize=False),
    "not rescaled": ViTImageProcessorPil(do_rescale=False, do_normalize=False),
    "not rescaled, normalized": ViTImageProcessorPil(
        do_rescale=False, image_mean=[124, 116, 104], image_std=[58, 57, 57]
    ),
    "another factor": ViTImageProcessorPil(rescale_factor=1 / 127.5),
    "offset": transformers.EfficientNetImageProcessorPil(
        rescale_offset=True, rescale_factor=1 / 127.5
    ),
    "BGR": transformers.MobileViTImageProcessorPil(),
    "padded": transformers.DonutImageProcessorPil(size={"height": 60, "width": 50}),
    "cropped": transformers.CLIPImageProcessorPil(),
    "patches": transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16),
}


def as_batch(image) -> torch.Tensor:
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)[None]


@pytest.mark.parametrize("crop", [False, True], ids=["squash", "crop"])
@pytest.mark.parametrize("name", SOURCES)
def test_colors_are_those_of_the_checkpoint_whatever_its_steps(name, crop, tmp_path):
    source = SOURCES[name]
    plain_processor(source, 48, crop, name).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert input_size(processor) == 48
    assert processor.resample == source.resample
    for size in ((56, 40), (40, 56), (100, 90), (48, 48)):
        image = draw_image(0, size)
        theirs = processor(images=image, return_tensors="pt")["pixel_values"]
        ours = preprocess(as_batch(image), processor)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
        # Decoded to the model's size first, as images of mixed sizes are.
        fitted = fit_image(image, 48, processor.resample, crop)
        assert torch.equal(preprocess(as_batch(fitted), processor), ours)
    if name not in ("padded", "cropped", "patches"):
        same_size = source(
            images=image, size={"height": 48, "width": 48}, do_center_crop=False,
            return_tensors="pt",
        )["pixel_values"]  # fmt: skip
        torch.testing.assert_close(ours, same_size.float(), rtol=1e-5, atol=1e-4)


def test_the_crop_is_the_center_of_the_shortest_edge():
    processor = plain_processor(SOURCES["not normalized"], 10, True, "")
    columns = torch.arange(30, dtype=torch.uint8).expand(1, 3, 10, 30)
    assert (preprocess(columns, processor)[0, 0, 0] * 255).round().tolist() == [*range(10, 20)]


def test_colors_that_are_not_reproduced_are_one_sentence(tmp_path, backbones):
    odd = transformers.MobileViTImageProcessorPil(do_rescale=False)
    with pytest.raises(UserError, match='of "m", MobileViTImageProcessorPil, changes colors'):
        plain_processor(odd, 32, False, "m")
    shutil.copy(f"{backbones['vit']}/config.json", tmp_path)
    transformers.ImageGPTImageProcessorPil(clusters=[[0, 0, 0]]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="Cannot load the image processor of"):
        build_processor(ModelArguments(model=str(tmp_path), image_size=32))


def test_resize_is_squash_or_crop(backbones):
    with pytest.raises(UserError, match='resize is "corp"; choose squash or crop'):
        build_processor(ModelArguments(model=backbones["vit"], image_size=32, resize="corp"))


@pytest.mark.parametrize(
    "change",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        *({"resample": number} for number in range(6)),
        {"size": {"shortest_edge": 32}, "do_center_crop": True,
         "crop_size": {"height": 32, "width": 32}},
    ],
    ids=str,
)  # fmt: skip
def test_a_models_processor_is_honored(backbones, tmp_path, change):
    processor = processor_with(backbones["vit"], tmp_path, change)
    assert all(getattr(processor, key) == value for key, value in change.items())


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"shortest_edge": 32}},
        {"size": {"shortest_edge": 40}, "do_center_crop": True,
         "crop_size": {"height": 32, "width": 32}},
        {"size": {"height": 32, "width": 48}},
        {"do_resize": False},
        {"do_pad": True, "pad_size": {"height": 48, "width": 48}},
        {"image_processor_type": "DonutImageProcessor"},
        {"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True},
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}},
        {"image_processor_type": "PerceiverImageProcessor"},
        {"image_processor_type": "Siglip2ImageProcessor"},
    ],
    ids=str,
)  # fmt: skip
def test_a_models_processor_that_is_not_reproduced_is_one_sentence(backbones, tmp_path, change):
    with pytest.raises(UserError, match="has steps that this pipeline does not reproduce"):
        processor_with(backbones["vit"], tmp_path, change)


def processor_with(model: str, folder, change: dict):
    """The image processor of a copy of the model with these settings, as `load_model` gives it."""
    load_model(model)[0].save_pretrained(folder)
    settings = json.loads(Path(model, "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | change))
    processor = load_model(str(folder))[1]
    assert is_reproduced(processor)
    return processor
