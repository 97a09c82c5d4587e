import shutil
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from launching import two_processes
from pipeline import runs
from pipeline.data import streaming
from pipeline.data.loading import load_split, load_splits
from pipeline.data.sources import digits
from pipeline.data.streaming import ImageStream, assign_split, load_stream
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import evaluate
from pipeline.recipe import DataArguments, data_arguments, load_recipe
from pipeline.training.checkpoints import last_checkpoint
from pipeline.training.train import train
from samples import ROOT, draw_image, image_processor

BICUBIC = 3


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """The digits as a folder of five parquet files, in row groups of a hundred."""
    folder = tmp_path_factory.mktemp("digits")
    everything = digits()
    for i in range(5):
        name = f"train-{i:05}-of-00005.parquet"
        everything.shard(5, i).to_parquet(folder / name, batch_size=100)
    return folder


def arguments(dataset, **options) -> DataArguments:
    options = {"validation_size": 0.1} | options
    return DataArguments(dataset=str(dataset), streaming=True, **options)


def stream(dataset="digits", batch_size=1, size=32, **options) -> ImageStream:
    rows = load_stream(arguments(dataset), "train")
    return ImageStream(rows, batch_size, image_processor(size, BICUBIC), **options)


def epochs(images: ImageStream, count: int) -> list[list[bytes]]:
    """The images of each of the first epochs, in order, from batches of one."""
    seen: list[list[bytes]] = [[]]
    for batch in images:
        if images.state["epoch"] == len(seen):
            seen.append([])
        if len(seen) > count:
            return seen[:count]
        seen[-1].append(batch["pixel_values"].numpy().tobytes())


def pixels_of(split: Dataset) -> set[bytes]:
    return {np.array(row["image"], np.uint8).tobytes() for row in split}


# With 20 shards: two processes share the shards, three and thirty the images of every shard.
@pytest.mark.parametrize("world_size", [1, 2, 3, 30])
def test_every_image_is_seen_once_per_epoch_in_one_process(published, world_size):
    assert load_stream(arguments(published), "train").num_shards == 20
    ranks = range(min(world_size, 3))
    streams = [stream(published, rank=rank, world_size=world_size) for rank in ranks]
    shares = [epochs(images, 1)[0] for images in streams]
    assert all(shares)
    seen = {image for share in shares for image in share}
    assert len(seen) == sum(map(len, shares))
    splits = load_splits(arguments(published), image_processor(), "validation", "test")
    validation, test = pixels_of(splits["validation"]), pixels_of(splits["test"])
    assert not validation & test
    assert not (validation | test) & seen
    if len(ranks) == world_size:
        assert len(seen | validation | test) == 1797


def test_splits_by_content_have_the_sizes_asked_for():
    files = [bytes([i % 256, i // 256]) for i in range(5000)]
    splits = [assign_split(file, validation_size=0.1, test_size=0.2) for file in files]
    assert splits == [assign_split(file, 0.1, 0.2) for file in files]
    assert splits.count("validation") == pytest.approx(500, rel=0.15)
    assert splits.count("test") == pytest.approx(1000, rel=0.15)


def test_validation_is_the_same_however_the_dataset_is_sharded(published):
    first, second = (
        load_split(arguments(dataset), "validation", image_processor())
        for dataset in (published, "digits")
    )
    assert pixels_of(first) == pixels_of(second)
    assert 130 < len(first) < 230  # about a tenth


def test_validation_is_bounded_and_from_all_shards(published, monkeypatch):
    monkeypatch.setattr(streaming, "VALIDATION_IMAGES", 40)
    few = load_split(arguments(published), "validation", image_processor())
    assert len(few) == 40
    rows = load_stream(arguments(published), "validation")
    first, last = (
        next(iter(rows.shard(20, shard).iter(1)))["label"][0].as_py() for shard in (0, 19)
    )
    assert (few[0]["label"], few[38]["label"]) == (first, last)


@pytest.mark.slow
def test_epochs_differ_and_so_do_seeds():
    first, second = epochs(stream(), 2)
    assert 1000 < len(first) < 1400
    assert set(first) == set(second)
    assert first != second
    assert epochs(stream(seed=1), 1)[0][:100] != first[:100]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("batches", [1, 7, 40])  # the last is in the second epoch
def test_a_stream_resumes_as_datasets_documents(published, tmp_path, monkeypatch, batches, rank):
    monkeypatch.setattr(streaming, "SHUFFLE_BUFFER", 64)
    monkeypatch.setattr(streaming, "READ_BATCH", 16)
    options = {"batch_size": 24, "rank": rank, "world_size": 2, "seed": 3}
    first = stream(published, **options)
    iterator = iter(first)
    for _ in range(batches):
        next(iterator)
    first.save(tmp_path)
    epoch = first.state["epoch"]
    rest = [next(iterator) for _ in range(3)]

    def images(found: list[dict]) -> list[bytes]:
        return [image.numpy().tobytes() for batch in found for image in batch["pixel_values"]]

    def resume() -> tuple[ImageStream, list[dict]]:
        again = stream(published, **options)
        again.resume(tmp_path)
        batches_seen = [{}] * batches  # for the Trainer to drop
        found = list(islice(iter(again), batches + 3))
        assert found[:batches] == batches_seen
        return again, found[batches:]

    again, resumed = resume()
    assert again.state["epoch"] >= epoch
    assert images(resumed) == images(resume()[1])  # the same each time
    assert len(rest) == len(resumed)
    with pytest.raises(UserError, match="not saved by a streamed run in 3 processes"):
        stream(published, rank=rank, world_size=3).resume(tmp_path)


def test_a_resumed_epoch_skips_no_more_than_the_buffers(published, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "SHUFFLE_BUFFER", 64)
    monkeypatch.setattr(streaming, "READ_BATCH", 16)
    first = stream(published)
    seen = [b["pixel_values"].numpy().tobytes() for b in islice(iter(first), 300)]
    first.save(tmp_path)
    again = stream(published)
    again.resume(tmp_path)
    rest = [b["pixel_values"].numpy().tobytes() for b in again_in_epoch(again, skip=300)]
    everything = epochs(stream(published), 1)[0]
    assert len(rest) == len(set(rest))
    # Documented: what the shuffle buffer held is lost, and of each open shard at most one batch.
    assert len(set(seen) | set(rest)) >= len(everything) - 64 - 16 * streaming.NUM_OPEN_SHARDS
    assert set(rest) <= set(everything)


def again_in_epoch(images: ImageStream, skip: int):
    """The batches that are left of the epoch a stream was resumed in."""
    epoch = images.state["epoch"]
    for batch in islice(images, skip, None):
        if images.state["epoch"] > epoch:
            return
        yield batch


@pytest.mark.parametrize("option", [{"train_split": "learn"}, {"test_split": "learn"}])
def test_a_split_that_does_not_exist_is_named(published, option):
    with pytest.raises(UserError, match='no split "learn"; it has train'):
        load_stream(arguments(published, **option), "train")


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
    assert alike["pixel_values"].shape == (8, 3, 10, 12)  # their own: no larger than 32
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


def test_large_files_are_decoded_in_threads_to_the_same(tmp_path, monkeypatch):
    photos = [draw_image(i) for i in range(20)]
    folder = write(tmp_path / "pets", photos, [0, 1] * 10)
    inline = next(iter(stream(folder, batch_size=8, num_threads=3)))
    monkeypatch.setattr(streaming, "SMALL_FILE", 0)
    threaded = next(iter(stream(folder, batch_size=8, num_threads=3)))
    assert torch.equal(inline["pixel_values"], threaded["pixel_values"])


def test_a_folder_of_files_can_be_streamed(image_folder):
    batch = next(iter(stream(image_folder, batch_size=4)))
    assert batch["pixel_values"].shape == (4, 3, 10, 12)


def test_rows_that_cannot_be_used_are_named(tmp_path):
    photos = [draw_image(i) for i in range(20)]
    folder = write(tmp_path / "unlabeled", photos, [0, 1, None, 1] * 5)
    with pytest.raises(UserError, match='split "train".* lacks .* label from 0 to 1.* None'):
        next(iter(stream(folder)))
    photos[3] = {"bytes": b"no image", "path": "third.png"}
    folder = write(tmp_path / "corrupt", photos, [0, 1] * 10)
    with pytest.raises(UserError, match=r'split "train" \(third\.png\) cannot be decoded'):
        for _ in islice(stream(folder), 20):
            pass
    with pytest.raises(UserError, match="too few training images for 99 processes"):
        next(iter(stream(folder, rank=98, world_size=99)))


def test_a_stream_needs_an_end(tiny_recipe):
    with pytest.raises(UserError, match="--max_steps"):
        load_recipe(tiny_recipe, ["--streaming"])
    recipe = load_recipe(tiny_recipe, ["--streaming", "--max_steps=50"])
    assert recipe.training.save_strategy == "steps"


def files(folder: str) -> set[Path]:
    return {path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.mark.slow
def test_a_streamed_run_learns_resumes_and_leaves_no_copy(tiny_recipe, published, here):
    options = ["--streaming", "--max_steps=60", "--save_steps=20", "--eval_steps=20"]
    options += [f"--dataset={published}", "--logging_steps=10", "--save_total_limit=9"]
    before = files(datasets.config.HF_DATASETS_CACHE)
    summary = train(load_recipe(tiny_recipe, options, "run"))
    assert files(datasets.config.HF_DATASETS_CACHE) == before
    losses = [entry["loss"] for entry in summary["log"] if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert summary["training_images"] == 60 * 64

    shutil.rmtree("models/run")  # as if it had been killed after its second checkpoint
    shutil.rmtree("models/checkpoints/run/checkpoint-60")
    assert last_checkpoint(Path("models/checkpoints/run")).name == "checkpoint-40"
    resumed = train(load_recipe(tiny_recipe, options, "run"))
    assert resumed["steps"] == 60
    # It goes on from what was learned before, with a log that begins with what was done before.
    assert resumed["log"][0] == summary["log"][0]
    assert resumed["log"][-1]["epoch"] == summary["log"][-1]["epoch"]

    results = evaluate("models/run", data_arguments("models/run"))
    assert 300 < results["dataset"]["images"] < 420  # about a fifth, apart from the others
    assert results["accuracy"] > 0.2
    assert files(datasets.config.HF_DATASETS_CACHE) - before  # until this process ends


@pytest.mark.slow
def test_two_processes_stream_to_one_model(tiny_recipe, published, here):
    options = ["--streaming", "--max_steps=30", f"--dataset={published}", "--logging_steps=5"]
    script = [ROOT / "scripts/train_vit.py", "--recipe", tiny_recipe, "--run=two", *options]
    result = two_processes("ddp", script)
    assert result.returncode == 0, result.stderr[-2000:]
    summary = runs.read_json(Path("models/two/training.json"))
    assert summary["training_images"] == 30 * 2 * 64
    losses = [entry["loss"] for entry in summary["log"] if "loss" in entry]
    assert losses[-1] < losses[0]
    names = {path.name for path in last_checkpoint(Path("models/checkpoints/two")).iterdir()}
    assert {"stream_0_of_2.json", "stream_1_of_2.json"} <= names
