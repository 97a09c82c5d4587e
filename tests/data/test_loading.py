import pickle
import shutil
from collections import Counter, namedtuple
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

import train_vit
from pipeline.data.decoding import DecodedImages, content_hash
from pipeline.data.loading import load_split, load_splits
from pipeline.errors import UserError
from pipeline.recipe import DataArguments
from samples import draw_image, image_processor, run_script

BICUBIC = 3


def load(dataset, *splits, size=32, **options):
    """All splits, or these, decoded."""
    data = DataArguments(dataset=str(dataset), **options)
    return load_splits(
        data, image_processor(size, BICUBIC), *(splits or ("train", "validation", "test"))
    )


def write_parquet(folder: Path, columns: dict, features: dict, split: str = "train") -> Path:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    dataset = Dataset.from_dict(columns, features=Features(features))
    dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def pets(count: int = 40, size: tuple[int, int] = (12, 10)) -> tuple[dict, dict]:
    """Columns and features of a small dataset with names of its own."""
    columns = {
        "id": list(range(count)),
        "photo": [draw_image(i, size) for i in range(count)],
        "animal": [i % 2 for i in range(count)],
    }
    features = {
        "id": Value("int64"),
        "photo": datasets.Image(),
        "animal": ClassLabel(names=["cat", "dog"]),
    }
    return columns, features


def test_digits_are_split_in_three_by_class():
    splits = load("digits", validation_size=0.1)
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 1293,
        "validation": 144,
        "test": 360,
    }
    for split in splits.values():
        share = np.array(list(Counter(split["label"]).values())) / len(split)
        assert share.min() > 0.08
        assert share.max() < 0.12
    # No image of one split stands in another (the digits hold no two equal images).
    images = [np.array(row["image"]).tobytes() for split in splits.values() for row in split]
    assert len(images) == len(set(images)) == 1797


def test_one_folder_per_class(image_folder):
    splits = load(image_folder, validation_size=0.25)
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert splits["train"].features["image"].shape == (3, 10, 12)  # as they are: no larger than 32
    assert sum(len(s) for s in splits.values()) == 40
    first = DecodedImages(splits["train"]).batch([0])
    pixels = first["pixel_values"][0].permute(1, 2, 0).numpy()
    start = 100 * int(first["labels"][0])
    assert any(np.array_equal(pixels, draw_image(start + i)) for i in range(20))


def test_columns_are_found_by_type_whatever_their_names(tmp_path):
    splits = load(write_parquet(tmp_path, *pets()), validation_size=0.25)
    assert splits["train"].column_names == ["image", "label"]
    assert splits["train"].features["label"].names == ["cat", "dog"]


def test_two_label_columns_want_a_choice(tmp_path):
    columns, features = pets()
    columns["coat"], features["coat"] = columns["animal"], ClassLabel(names=["short", "long"])
    folder = write_parquet(tmp_path, columns, features)
    with pytest.raises(UserError, match=r"2 label columns, animal, coat, .*--label_column"):
        load(folder)
    splits = load(folder, label_column="coat", validation_size=0.25)
    assert splits["train"].features["label"].names == ["short", "long"]


def test_mixed_and_large_images_come_to_the_recipes_size(tmp_path):
    columns, features = pets()
    columns["photo"][7] = draw_image(7, (30, 9))
    mixed = load(write_parquet(tmp_path / "mixed", columns, features), validation_size=0.25)
    shapes = {split.features["image"].shape for split in mixed.values()}
    assert shapes == {(3, 10, 12), (3, 32, 32)}  # the split with the odd one is resized
    large = load(write_parquet(tmp_path / "large", *pets(size=(50, 40))), validation_size=0.25)
    assert large["train"].features["image"].shape == (3, 32, 32)
    # Resized as the image processor would: Pillow, the whole image.
    expected = np.asarray(draw_image(0, (50, 40)).resize((32, 32), BICUBIC)).transpose(2, 0, 1)
    everything = datasets.concatenate_datasets([large["train"], large["validation"], large["test"]])
    found = everything.with_format("numpy")["image"][:]
    assert any(np.array_equal(image, expected) for image in found)


def test_decoding_is_cached(tmp_path):
    folder = write_parquet(tmp_path, *pets())
    write_parquet(tmp_path, *pets(), split="test")
    files = [load(folder, validation_size=0.25)["test"].cache_files for _ in range(2)]
    assert files[0] == files[1]
    stamps = Path(files[0][0]["filename"]).stat().st_mtime_ns
    load(folder, validation_size=0.25)
    assert Path(files[0][0]["filename"]).stat().st_mtime_ns == stamps


def test_several_processes_decode_to_the_same(tmp_path):
    folder = write_parquet(tmp_path, *pets())
    one = load(folder, validation_size=0.25, num_proc=1)
    two = load(folder, validation_size=0.25, num_proc=2)
    assert content_hash(one["train"]) == content_hash(two["train"])


def test_batches_are_the_images_in_the_order_asked_for():
    split = load("digits", "test")["test"]
    batch = DecodedImages(split).batch([5, 3, 200])
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    for i, row in enumerate([5, 3, 200]):
        assert torch.equal(batch["pixel_values"][i], torch.tensor(split[row]["image"]))
        assert batch["labels"][i] == split[row]["label"]


@pytest.mark.parametrize(
    "part",
    [
        lambda d: d,
        lambda d: d.select(range(7, 31)),  # a slice, with no list of its rows
        lambda d: d.select([30, 2, 9]),
        lambda d: d.shuffle(seed=0).select(range(5, 25)),
        lambda d: datasets.concatenate_datasets([d.select(range(3)), d.select([8, 5])]),
    ],
    ids=["whole", "slice", "chosen", "slice of shuffled", "joined"],
)
@pytest.mark.parametrize("num_proc", [1, 2])
def test_batches_are_those_of_the_dataset_whatever_was_done_to_it(tmp_path, part, num_proc):
    folder = write_parquet(tmp_path, *pets())
    write_parquet(tmp_path, *pets(), split="test")
    split = part(load(folder, "test", num_proc=num_proc)["test"])
    batches = pickle.loads(pickle.dumps(DecodedImages(split)))  # as a worker gets it
    rows = list(range(len(split)))[::-1]
    batch = batches.batch(rows)
    for i, row in enumerate(rows):
        assert np.array_equal(batch["pixel_values"][i], split[row]["image"])
        assert batch["labels"][i] == split[row]["label"]


def test_content_hash_knows_a_changed_image(tmp_path):
    columns, features = pets()
    first = load(write_parquet(tmp_path / "a", columns, features), validation_size=0.25)
    copy = load(write_parquet(tmp_path / "b", columns, features), validation_size=0.25)
    columns["photo"] = [draw_image(99), *columns["photo"][1:]]
    other = load(write_parquet(tmp_path / "c", columns, features), validation_size=0.25)
    hashes = [tuple(content_hash(s) for s in splits.values()) for splits in (first, copy, other)]
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


# What a person can mend is one sentence that names it.


def test_no_such_folder():
    with pytest.raises(UserError, match='no folder "./nowhere"'):
        load("./nowhere")


def test_no_image_column(tmp_path):
    columns, features = pets()
    del columns["photo"], features["photo"]
    with pytest.raises(UserError, match=r"no image column.*id \(Value\), animal \(ClassLabel\)"):
        load(write_parquet(tmp_path, columns, features))


def test_no_label_column(tmp_path):
    columns, features = pets()
    del columns["animal"], features["animal"]
    with pytest.raises(UserError, match=r"no label column.*photo \(Image\)"):
        load(write_parquet(tmp_path, columns, features))


@pytest.mark.parametrize("num_proc", [1, 2])
def test_an_image_that_cannot_be_decoded_is_named_by_split_and_row(image_folder, num_proc):
    (image_folder / "train" / "dog" / "03.png").write_bytes(b"no picture at all")
    with pytest.raises(
        UserError, match=r'row 23 of the split "train" \(.*03\.png\) cannot be decoded'
    ):
        load(image_folder, num_proc=num_proc)


@pytest.mark.parametrize("label", [None, -1])
def test_a_missing_label_is_named(tmp_path, label):
    columns, features = pets()
    columns["animal"][11] = label
    with pytest.raises(
        UserError, match=r'"train" .* no labels .* for 1 of 40 images, first in row 11:'
    ):
        load(write_parquet(tmp_path, columns, features))


def test_a_split_with_one_class(tmp_path):
    columns, features = pets()
    columns["animal"] = [1] * 40
    with pytest.raises(UserError, match='split "train" .* of one class only, "dog"'):
        load(write_parquet(tmp_path, columns, features))


def test_a_split_that_is_not_there(image_folder):
    with pytest.raises(UserError, match='no split "holdout"; it has train'):
        load(image_folder, test_split="holdout")


def test_a_folder_that_can_not_be_read_is_one_sentence(tmp_path):
    columns, features = pets()
    for split, names in (("train", ("photo",)), ("test", ("picture",))):
        renamed = {"photo": names[0]}
        write_parquet(
            tmp_path / "columns",
            {renamed.get(key, key): value for key, value in columns.items()},
            {renamed.get(key, key): value for key, value in features.items()},
            split,
        )
    write_parquet(tmp_path / "cut", columns, features)
    file = next((tmp_path / "cut").rglob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-20])
    write_parquet(tmp_path / "header", columns, features)
    (tmp_path / "header/README.md").write_text("---\nconfigs: [\n---\n")
    for name, message in (
        ("columns", r'The split "test" of .* has no column "photo", only'),
        ("cut", "Cannot load the dataset"),
        ("header", "Cannot read the header of"),
    ):
        with pytest.raises(UserError, match=message):
            load(tmp_path / name)


def test_a_form_for_predictions_is_not_taken_for_labels(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i in range(12):
            draw_image(i + 100 * (split == "test")).save(tmp_path / split / f"{split}{i}.png")
    rows = "".join(f"train{i}.png,{i % 2}\n" for i in range(12))
    (tmp_path / "train_labels.csv").write_text("id,label\n" + rows)
    rows = "".join(f"test{i}.png,0\n" for i in range(12))
    (tmp_path / "sample_submission.csv").write_text("id,label\n" + rows)
    with pytest.raises(UserError, match="looks like a form for predictions"):
        load(tmp_path, "train")
    rows = "".join(f"elsewhere{i}.png,0\n" for i in range(12))
    (tmp_path / "sample_submission.csv").write_text("id,label\n" + rows)  # lists no image here
    assert load(tmp_path, "train", validation_size=0.2)["train"].features["label"].names


def test_a_class_may_begin_with_underscores_and_a_label_stand_first(tmp_path):
    for name in ("cat", "__background__"):
        (tmp_path / "folders" / name).mkdir(parents=True)
        for i in range(10):
            draw_image(i + 50 * (name == "cat")).save(tmp_path / "folders" / name / f"{i}.png")
    train = load(tmp_path / "folders", "train", validation_size=0.2)["train"]
    assert train.features["label"].names == ["__background__", "cat"]
    (tmp_path / "table").mkdir()
    for i in range(12):
        draw_image(i).save(tmp_path / "table" / f"{i}.png")
    rows = "".join(f"{i % 2},{i}\n" for i in range(12))
    (tmp_path / "table/labels.csv").write_text("label,id\n" + rows)
    splits = load(tmp_path / "table", validation_size=0.2)
    assert sum(map(len, splits.values())) == 12


def test_too_few_images_to_split(tmp_path):
    with pytest.raises(UserError, match="Cannot split 20% .* off for test: no class has two"):
        load(write_parquet(tmp_path, *pets(count=2)))


def test_no_room_for_the_cache(tmp_path, monkeypatch):
    folder = write_parquet(tmp_path, *pets())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 0))
    with pytest.raises(UserError, match=r"need .* GB in .*HF_DATASETS_CACHE"):
        load(folder)


def test_an_unreachable_hub_names_the_ways_out(here, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # none there
    with pytest.raises(UserError, match="Cannot reach the Hub at http://127.0.0.1:9") as error:
        run_script(monkeypatch, train_vit.main, "--recipe=vit-base")
    for way in ("make demo", "DATASET=", "MODEL=", "HF_ENDPOINT"):
        assert way in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_real_cifar10_is_mapped_whole(shared):
    test = load_split(
        DataArguments(dataset=str(shared / "data/cifar10")), "test", image_processor(98)
    )
    assert len(test) == 10_000
    assert test.features["image"].shape == (3, 32, 32)
    assert Counter(test["label"]) == dict.fromkeys(range(10), 1000)
    assert sum(Path(f["filename"]).stat().st_size for f in test.cache_files) < 0.25e9 / 6
