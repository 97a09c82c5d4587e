import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, draw_image
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file

from pipeline import evaluation, streaming
from pipeline.data import digits, load_splits
from pipeline.errors import UserError
from pipeline.recipe import DataArguments, load_recipe
from pipeline.streaming import ImageStream, Rows
from pipeline.training import last_checkpoint, train

BICUBIC = 3


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """The digits as a folder of five parquet files, of row groups of a hundred."""
    folder = tmp_path_factory.mktemp("digits")
    everything = digits()
    for i in range(5):
        name = f"train-{i:05}-of-00005.parquet"
        everything.shard(5, i).to_parquet(folder / name, batch_size=100)
    return folder


def arguments(dataset, **options) -> DataArguments:
    return DataArguments(dataset=str(dataset), streaming=True, **options)


def stream(dataset="digits", batch_size=1, size=32, **options) -> ImageStream:
    data = arguments(dataset, validation_size=0.1)
    return ImageStream(Rows(data, "train"), batch_size, size, BICUBIC, **options)


def one_epoch(images: ImageStream) -> list[bytes]:
    """The images of the first epoch, in its order, from batches of one."""
    seen = []
    for batch in images:
        if {"before": len(seen), "epoch": 1} in [
            {key: block[key] for key in ("before", "epoch")} for block in images.blocks.copy()
        ]:
            return seen
        seen.append(batch["pixel_values"].numpy().tobytes())


def pixels_of(split: Dataset) -> set[bytes]:
    return {np.array(row["image"], np.uint8).tobytes() for row in split}


@pytest.mark.parametrize("processes", [1, 2, 3, 30])  # with 30, each reads all 20 shards
def test_every_image_is_in_one_batch_of_one_process(published, processes):
    assert Rows(arguments(published), "train").shards == 20
    some = min(processes, 3)
    shares = [one_epoch(stream(published, process=p, processes=processes)) for p in range(some)]
    assert all(shares)
    seen = {image for share in shares for image in share}
    assert len(seen) == sum(map(len, shares))
    splits = load_splits(arguments(published, validation_size=0.1), 32, BICUBIC)
    validation, test = pixels_of(splits["validation"]), pixels_of(splits["test"])
    assert not validation & test
    assert not (validation | test) & seen
    if some == processes:
        assert len(seen | validation | test) == 1797


def test_validation_is_the_same_however_the_dataset_is_cut(published):
    first, second = (
        load_splits(arguments(d, validation_size=0.1), 32, BICUBIC, "validation")["validation"]
        for d in (published, "digits")
    )
    assert pixels_of(first) == pixels_of(second)
    assert 130 < len(first) < 230  # about a tenth


def test_validation_is_bounded_and_from_all_shards(published, monkeypatch):
    monkeypatch.setattr(streaming, "VALIDATION", 40)
    data = arguments(published, validation_size=0.1)
    few = load_splits(data, 32, BICUBIC, "validation")["validation"]
    assert len(few) == 40
    rows = Rows(data, "train")
    firsts = [next(e for e in rows.shard(s) if rows.part(e) == "validation") for s in (0, 19)]
    assert {few[0]["label"], few[38]["label"]} == {e.label for e in firsts}


def test_epochs_differ_and_so_do_seeds():
    images = list(islice(stream(), 3000))
    pixels = [batch["pixel_values"].numpy().tobytes() for batch in images]
    count = len(one_epoch(stream()))
    assert 1000 < count < 1400
    assert set(pixels[:count]) == set(pixels[count : 2 * count])
    assert pixels[:count] != pixels[count : 2 * count]
    other = [b["pixel_values"].numpy().tobytes() for b in islice(stream(seed=1), 100)]
    assert other != pixels[:100]


def test_no_more_is_read_than_is_held(published, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 100)
    images = stream(published)
    iterator = iter(images)
    for _ in range(5):
        next(iterator)
    # The block given out, the one behind it, and perhaps one more; a fifth is held out.
    assert images.blocks[-1]["position"]["read"] < 3 * 100 / 0.6


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("batches", [1, 7, 25, 60])  # the fourth is in a later epoch
def test_a_stream_goes_on_where_it_was(published, tmp_path, monkeypatch, batches, process):
    monkeypatch.setattr(streaming, "BLOCK", 150)
    options = {"batch_size": 24, "process": process, "processes": 2, "seed": 3}
    first = stream(published, **options)
    iterator = iter(first)
    for _ in range(batches):
        next(iterator)
    first.save(tmp_path, batches)
    expected = [next(iterator) for _ in range(20)]
    second = stream(published, **options)
    second.resume(tmp_path)
    again = iter(second)
    assert [next(again) for _ in range(batches)] == [{}] * batches
    for theirs, ours in zip(expected, again, strict=False):  # draws no more than are compared
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
        assert torch.equal(ours["labels"], theirs["labels"])
    # And once more, from what was resumed.
    second.save(tmp_path, batches + 20)
    third = stream(published, **options)
    third.resume(tmp_path)
    once_more = iter(third)
    assert [next(once_more) for _ in range(batches + 20)] == [{}] * (batches + 20)
    for theirs, ours in zip([next(again) for _ in range(20)], once_more, strict=False):
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    with pytest.raises(UserError, match="not of a streamed run in 3 processes"):
        stream(published, process=process, processes=3).resume(tmp_path)


@pytest.mark.parametrize("option", [{"train_split": "learn"}, {"test_split": "learn"}])
def test_a_split_that_is_not_there_is_named(published, option):
    with pytest.raises(UserError, match='no split "learn"; it has train'):
        data = arguments(published, **option)
        Rows(data, data.train_split)


def write(folder: Path, photos: list, animals: list) -> Path:
    features = {"photo": datasets.Image(), "animal": ClassLabel(names=["cat", "dog"])}
    features["id"] = Value("int64")
    columns = {"photo": photos, "animal": animals, "id": list(range(len(photos)))}
    folder.mkdir()
    table = Dataset.from_dict(columns, features=Features(features))
    table.to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def test_images_of_a_batch_come_to_one_size(tmp_path):
    photos = [draw_image(i) for i in range(20)]
    alike = next(iter(stream(write(tmp_path / "alike", photos, [0, 1] * 10), batch_size=8)))
    assert alike["pixel_values"].shape == (8, 3, 10, 12)  # as they are: no larger than 32
    assert alike["pixel_values"].dtype == torch.uint8
    assert alike["labels"].dtype == torch.int64

    photos = [draw_image(i, (50, 40) if i % 2 else (12, 10)) for i in range(20)]
    mixed = next(iter(stream(write(tmp_path / "mixed", photos, [0, 1] * 10), batch_size=8)))
    known = {  # resized as the image processor would: Pillow, the whole image
        np.asarray(p.resize((32, 32), BICUBIC)).transpose(2, 0, 1).tobytes(): i % 2
        for i, p in enumerate(photos)
    }
    for image, label in zip(mixed["pixel_values"], mixed["labels"], strict=True):
        assert known[image.numpy().tobytes()] == label


def test_a_folder_of_files_can_be_streamed(image_folder):
    batch = next(iter(stream(image_folder, batch_size=4)))
    assert batch["pixel_values"].shape == (4, 3, 10, 12)


def test_rows_that_cannot_be_used_are_named(tmp_path):
    photos = [draw_image(i) for i in range(20)]
    folder = write(tmp_path / "unlabelled", photos, [0, 1, None, 1] * 5)
    with pytest.raises(UserError, match='"train", row 2 of shard 0, lacks an image or a label'):
        next(iter(stream(folder)))
    photos[3] = {"bytes": b"no image", "path": None}
    folder = write(tmp_path / "spoilt", photos, [0, 1] * 10)
    with pytest.raises(UserError, match="row 3 of shard 0, cannot be decoded"):
        for _ in islice(stream(folder), 20):
            pass
    with pytest.raises(UserError, match="no training image for each of 99 processes"):
        next(iter(stream(folder, process=98, processes=99)))


def test_a_stream_wants_to_know_its_end(tiny_recipe):
    with pytest.raises(UserError, match="--max_steps"):
        load_recipe(tiny_recipe, ["--streaming"])
    recipe = load_recipe(tiny_recipe, ["--streaming", "--max_steps=50"])
    assert recipe.training.save_strategy == "steps"


def files(folder: str) -> set[Path]:
    return {path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_a_streamed_run_learns_resumes_and_leaves_no_copy(tiny_recipe, published, here):
    options = ["--streaming", "--max_steps=60", "--save_steps=20", "--eval_steps=20"]
    options += [f"--dataset={published}", "--logging_steps=10", "--save_total_limit=9"]
    before = files(datasets.config.HF_DATASETS_CACHE)
    summary = train(load_recipe(tiny_recipe, options, "run"))
    assert files(datasets.config.HF_DATASETS_CACHE) == before
    losses = [entry["loss"] for entry in summary["log"] if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert summary["training_images"] == 60 * 64

    whole = load_file("models/run/model.safetensors")
    shutil.rmtree("models/run")  # as if it had been killed after its second checkpoint
    shutil.rmtree("models/checkpoints/run/checkpoint-60")
    assert last_checkpoint(Path("models/checkpoints/run")).name == "checkpoint-40"
    assert train(load_recipe(tiny_recipe, options, "run"))["steps"] == 60
    resumed = load_file("models/run/model.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)

    results = evaluation.evaluate("models/run", evaluation.data_of("models/run"))
    assert 300 < results["dataset"]["images"] < 420  # about a fifth, apart from the others
    assert results["accuracy"] > 0.2
    assert files(datasets.config.HF_DATASETS_CACHE) - before  # until this process ends


def test_two_processes_stream_to_one_model(tiny_recipe, published, here):
    options = ["--streaming", "--max_steps=30", f"--dataset={published}", "--logging_steps=5"]
    script = [ROOT / "scripts/train_vit.py", "--recipe", tiny_recipe, "--run=two", *options]
    result = subprocess.run(
        [sys.executable, ROOT / "scripts/launch.py", "--nproc=2", *script],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    summary = json.loads(Path("models/two/training.json").read_text())
    assert summary["training_images"] == 30 * 2 * 64
    losses = [entry["loss"] for entry in summary["log"] if "loss" in entry]
    assert losses[-1] < losses[0]
    names = {path.name for path in last_checkpoint(Path("models/checkpoints/two")).iterdir()}
    assert {"stream_0_of_2.json", "stream_1_of_2.json"} <= names
