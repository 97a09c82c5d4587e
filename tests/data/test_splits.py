"""Splits are what they say."""

import re
from dataclasses import replace

import numpy as np
import pytest

from layouts import files, put, split_folders
from pipeline.data.loading import fingerprint, load_raw, load_splits
from pipeline.data.sources import load_source
from pipeline.data.splits import assign_roles, choose_rows
from pipeline.errors import UserError
from pipeline.recipe import DataArguments
from samples import image_processor


@pytest.mark.parametrize(
    ("names", "options", "roles"),
    [
        ("train", {}, {"train": "train"}),
        ("train test", {}, {"train": "train", "test": "test"}),
        ("train dev test", {}, {"train": "train", "test": "test", "validation": "dev"}),
        ("train validation", {}, {"train": "train", "test": "validation"}),
        ("Training VAL", {}, {"train": "Training", "test": "VAL"}),
        ("test", {}, {"test": "test"}),
        ("valid", {}, {"test": "valid"}),
        (
            "train valid",
            {"validation_split": "valid"},
            {"train": "train", "validation": "valid"},
        ),
        ("train valid", {"test_split": "valid"}, {"train": "train", "test": "valid"}),
        (
            "a b c",
            {"train_split": "a", "validation_split": "b", "test_split": "c"},
            {"train": "a", "test": "c", "validation": "b"},
        ),
    ],
)
def test_each_published_split_plays_its_part(names, options, roles):
    assert assign_roles(names.split(), DataArguments(**options)) == roles


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("train test", {"test_split": "train"}, "must differ"),
        ("train test", {"validation_split": "test"}, "must differ"),
        ("train test", {"train_split": "test"}, "must differ"),
        (
            "train val dev",
            {},
            "2 validation splits; it has train, val, dev. Name .*--validation_split",
        ),
        ("train", {"validation_split": "holdout"}, 'no split "holdout"; it has train'),
        ("full", {}, 'no split "train"; it has full'),
    ],
)
def test_splits_that_are_not_clear_are_refused(names, options, message):
    with pytest.raises(UserError, match=message):
        assign_roles(names.split(), DataArguments(**options))


def test_a_published_validation_split_picks_the_checkpoint(tmp_path, capsys):
    split_folders(tmp_path)
    splits = load_splits(
        DataArguments(dataset=str(tmp_path)), image_processor(), "train", "validation", "test"
    )
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 12,
        "validation": 4,
        "test": 6,
    }
    printed = capsys.readouterr().out
    assert "train is 'train', validation is 'validation', test is 'test'" in printed
    assert "Warning" not in printed


def test_a_test_split_alone_can_be_scored_but_not_trained_on(tmp_path):
    put(tmp_path / "test", files())
    data = DataArguments(dataset=str(tmp_path))
    assert list(load_splits(data, image_processor(), "test", "validation")) == ["test"]
    with pytest.raises(UserError, match="has no train split"):
        load_splits(data, image_processor(), "train", "validation")


def test_equal_images_in_two_splits_are_counted(tmp_path, capsys):
    put(tmp_path / "train", train := files())
    put(tmp_path / "test", train[:3] + files(seed=50))
    load_splits(
        DataArguments(dataset=str(tmp_path), validation_size=0.25), image_processor(), "train"
    )
    counts = re.findall(r"(\d) images of the test split are also in", capsys.readouterr().out)
    assert sum(map(int, counts)) == 3  # in train or in what was split off it


def test_classes_too_small_to_split_stay_in_train_and_are_named(tmp_path, capsys):
    put(tmp_path, files("cat dog", count=20) + files("bird", 1, seed=90))
    raw = load_raw(DataArguments(dataset=str(tmp_path)))
    names = raw["train"].features["label"].names
    counts = {
        name: np.bincount(split["label"][:], minlength=3).tolist() for name, split in raw.items()
    }
    assert names == ["bird", "cat", "dog"]
    assert counts["train"][0] == 1
    assert np.sum(list(counts.values()), axis=0).tolist() == [1, 20, 20]
    assert len(raw["test"]) == 8
    assert len(raw["validation"]) == 2
    assert 'Classes with too few images for the test split, all kept in train: "bird"' in (
        capsys.readouterr().out
    )


def test_rows_are_chosen_by_class_and_leave_one_of_each():
    labels = np.repeat([0, 1, 2, 3], [1000, 100, 10, 1])
    rows = choose_rows(labels, 111)
    assert np.bincount(labels[rows], minlength=4).tolist() == [100, 10, 1, 0]
    assert np.array_equal(rows, choose_rows(labels, 111))
    assert np.bincount(labels[choose_rows(labels, 5000)]).tolist() == [999, 99, 9]


def test_a_quick_trial_takes_the_same_share_of_each_class(tmp_path):
    put(tmp_path / "train", files("cat", 40) + files("dog", 20, seed=50) + files("ox", 2, seed=80))
    put(tmp_path / "test", files("cat dog ox", seed=200))
    data = DataArguments(dataset=str(tmp_path), validation_size=0.05, max_train_samples=12)
    train = load_raw(data)["train"]
    assert len(train) == 12
    assert np.bincount(train["label"][:])[:2].tolist() == [8, 3]
    assert train["row"][:] == load_raw(data)["train"]["row"][:]
    with pytest.raises(UserError, match="max_train_samples is 2, but there are 3 classes"):
        load_raw(replace(data, max_train_samples=2))
    assert len(load_raw(replace(data, max_train_samples=999))["train"]) == 58


def test_the_fingerprint_knows_a_new_file_a_changed_one_and_a_renamed_class(tmp_path):
    images = files()
    put(tmp_path / "a", images)
    put(tmp_path / "b", images)
    first, copy = (fingerprint(DataArguments(dataset=str(tmp_path / n))) for n in "ab")
    assert first == copy

    def now() -> str:
        return fingerprint(DataArguments(dataset=str(tmp_path / "b")))

    seen = [first]
    put(tmp_path / "b", files("dog", 1, seed=99), "{label}/new.png")
    seen.append(now())
    (tmp_path / "b" / "dog" / "new.png").write_bytes(images[0][1])
    seen.append(now())
    (tmp_path / "b" / "dog").rename(tmp_path / "b" / "hound")
    seen.append(now())
    assert len(set(seen)) == 4


def test_an_opened_dataset_is_handed_on(tmp_path):
    put(tmp_path, files("dog cat", count=20))
    data = DataArguments(dataset=str(tmp_path), validation_size=0.25)
    source = load_source(data)
    names = ["dog", "bird", "cat"]
    expected = fingerprint(data)
    by_model = load_splits(source, image_processor(), "test", names=names)["test"]
    assert by_model.features["label"].names == names
    assert np.bincount(by_model["label"][:], minlength=3).tolist() == [4, 0, 4]
    assert source.names == ["cat", "dog"]  # as they were
    assert fingerprint(source) == expected


def test_a_stream_takes_the_published_validation_split_whole(tmp_path):
    split_folders(tmp_path, ("train", "val", "test"))
    data = DataArguments(dataset=str(tmp_path), streaming=True)
    assert len(load_source(data).roles) == 3
    splits = load_splits(data, image_processor(), "validation", "test")
    assert [len(split) for split in splits.values()] == [4, 6]
