"""Pixels arrive as they are: 16-bit gray is scaled, what has no fixed range is refused."""

import io
from itertools import islice

import numpy as np
import pytest
from datasets import ClassLabel
from PIL import ExifTags, Image

import inference
from layouts import files, parquet, put
from pipeline.data.decoding import DecodedImages, open_image
from pipeline.data.loading import load_splits
from pipeline.data.streaming import ImageStream, load_stream
from pipeline.errors import UserError
from pipeline.recipe import DataArguments
from pipeline.runs import print_once
from samples import draw_image, image_processor

RAMP = np.arange(256).reshape(16, 16)  # each 8-bit gray once


def encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def pgm(values: np.ndarray) -> bytes:
    return b"P5\n16 16\n65535\n" + values.astype(">u2").tobytes()


WIDE = Image.fromarray((RAMP * 257).astype(np.uint16))
GRAY = {
    "8-bit PNG": encode(Image.fromarray(RAMP.astype(np.uint8)), "PNG"),
    "16-bit PNG": encode(WIDE, "PNG"),
    "16-bit TIFF": encode(WIDE, "TIFF"),
    "big-endian TIFF": encode(
        Image.frombytes("I;16B", (16, 16), (RAMP * 257).astype(">u2")), "TIFF"
    ),
    "16-bit PGM": pgm(RAMP * 257),
}


def test_what_pillow_raises_for_rare_damage_is_one_sentence():
    image, exif = draw_image(0, (40, 30)), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.DateTime] = "2026:01:01 00:00:00"
    image.save(jpeg := io.BytesIO(), "JPEG", exif=exif)
    content = bytearray(jpeg.getvalue())
    content[content.index(b"Exif\0\0") + 29] = 1  # the type of DateTime: no longer text
    image.save(avif := io.BytesIO(), "AVIF")
    for damaged in (content, avif.getvalue()[:81] + b"\xff" + avif.getvalue()[82:]):
        with pytest.raises(UserError, match="it cannot be decoded"):
            open_image(bytes(damaged), "it")


@pytest.mark.parametrize("name", GRAY)
def test_gray_of_8_and_16_bits_is_the_same_picture(name):
    pixels = np.asarray(open_image(GRAY[name], "it"))
    assert np.array_equal(pixels, np.repeat(RAMP[..., None], 3, axis=2))


@pytest.mark.parametrize("name", [name for name in GRAY if "PGM" not in name])
def test_the_space_scales_gray_as_training_does(name):
    trained = open_image(GRAY[name], "it")
    assert np.array_equal(np.asarray(inference.open_picture(GRAY[name])), np.asarray(trained))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_gray_of_32_bits_is_refused_everywhere(dtype):
    file = encode(Image.fromarray(RAMP.astype(dtype)), "TIFF")
    with pytest.raises(UserError, match="it cannot be decoded .32-bit gray .* to 8 or 16 bits"):
        open_image(file, "it")
    with pytest.raises(inference.UserError, match="32-bit gray .* to 8 or 16 bits"):
        inference.open_picture(file)


@pytest.mark.parametrize("kind", ["PNG", "AVIF", "WEBP"])
def test_formats_that_pillow_reads_are_read(kind):
    image = draw_image(0, (40, 30))
    pixels = np.asarray(open_image(encode(image, kind), "it"), np.int16)
    limit = 0 if kind == "PNG" else 60  # these lose detail
    assert np.abs(pixels - np.asarray(image)).mean() <= limit


def test_a_turned_photo_is_upright():
    image, buffer = draw_image(0, (40, 30)), io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the camera was turned by 90 degrees
    image.save(buffer, "PNG", exif=exif)
    upright = open_image(buffer.getvalue(), "it")
    assert upright.size == (30, 40)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(image), -1))


@pytest.fixture
def corrupt(tmp_path) -> DataArguments:
    """Twenty images in train, three of them corrupt, and test images."""
    put(tmp_path / "train", files(count=10))
    put(tmp_path / "test", files(count=2, seed=100))
    (tmp_path / "train/cat/0.png").write_bytes(b"no image")
    cut = tmp_path / "train/cat/3.png"
    cut.write_bytes(cut.read_bytes()[:900])
    (tmp_path / "train/dog/15.png").write_bytes(b"")
    return DataArguments(dataset=str(tmp_path), validation_size=0.25)


def test_a_corrupt_image_is_an_error_with_its_file_and_row(corrupt):
    with pytest.raises(
        UserError,
        match=r'image in row \d+ of the split "train" .*/train/(cat|dog)/\d+\.png.* cannot',
    ):
        load_splits(corrupt, image_processor(64), "train", "validation")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_corrupt_images_are_left_out_and_named_each_time(corrupt, capsys, num_proc):
    corrupt.skip_corrupt, corrupt.num_proc = True, num_proc
    for _ in range(2):  # decoded, and from the cache of another process
        print_once.cache_clear()
        splits = load_splits(corrupt, image_processor(64), "train", "validation", "test")
        assert len(splits["train"]) + len(splits["validation"]) == 17
        assert splits["train"].column_names == ["image", "label"]
        printed = capsys.readouterr().out
        for file in ("cat/0.png", "cat/3.png", "dog/15.png"):
            assert f"train/{file})" in printed
        assert 'of the split "test"' not in printed
    batch = DecodedImages(splits["train"]).batch(range(len(splits["train"])))
    assert batch["pixel_values"].shape[1:] == (3, 30, 40)


def stream(data: DataArguments) -> ImageStream:
    rows = load_stream(data, "train")
    return ImageStream(rows, 4, image_processor(64), skip_corrupt=data.skip_corrupt)


def test_corrupt_images_of_a_stream_are_left_out_and_named_once(corrupt, capsys):
    corrupt.streaming = True
    with pytest.raises(UserError, match=r"train/.*/\d+\.png.* cannot be decoded"):
        list(islice(stream(corrupt), 20))
    corrupt.skip_corrupt = True
    capsys.readouterr()
    images = stream(corrupt)
    validation = load_splits(corrupt, image_processor(64), "validation")["validation"]
    for batch in images:
        assert len(batch["pixel_values"]) == len(batch["labels"]) > 0
        if images.state["epoch"] == 2:
            break
    printed = capsys.readouterr().out
    assert printed.count("Skipped") - printed.count("Skipped 1 corrupt") <= 3
    for file in ("cat/0.png", "cat/3.png", "dog/15.png"):
        assert printed.count(f"train/{file})") == 1
    assert len(validation) > 0


def test_a_split_of_corrupt_images_is_an_error_all_the_same(tmp_path):
    images = [(label, b"no image") for label, _ in files()]
    parquet(tmp_path / "train.parquet", images, ClassLabel(names=["cat", "dog"]), [0, 1] * 6)
    data = DataArguments(dataset=str(tmp_path), skip_corrupt=True, validation_size=0.25)
    with pytest.raises(UserError, match='No image of the split "train" can be decoded'):
        load_splits(data, image_processor(64), "train")
