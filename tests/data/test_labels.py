"""Labels of every kind that means a class, in one numbering for all splits."""

from collections import Counter

import datasets
import pyarrow as pa
import pytest
from datasets import ClassLabel, Features, Value

from layouts import files, parquet
from pipeline.data.labels import encode
from pipeline.data.loading import load_raw, load_split
from pipeline.data.streaming import load_stream
from pipeline.errors import UserError
from pipeline.recipe import DataArguments
from samples import image_processor


def write(folder, kind, labels: list, split: str = "train", **more) -> DataArguments:
    """Write a parquet file of images with these labels."""
    images = files(count=-(-len(labels) // 2), seed=1000 * (split == "test"))[: len(labels)]
    parquet(folder / f"{split}-0.parquet", images, kind, labels, **more)
    return DataArguments(dataset=str(folder), validation_size=0.25)


def classes(data: DataArguments) -> list[str]:
    return load_raw(data)["train"].features["label"].names


@pytest.mark.parametrize(
    ("kind", "labels", "names"),
    [
        (ClassLabel(names=["b", "a"]), [0, 1], ["b", "a"]),  # as published
        (Value("string"), ["10", "2"], ["2", "10"]),
        (Value("large_string"), ["img10", "img9"], ["img9", "img10"]),
        (Value("int64"), [10, 2], ["2", "10"]),
        (Value("int8"), [1, -1], ["-1", "1"]),
        (Value("uint16"), [7, 40000], ["7", "40000"]),
        (Value("bool"), [True, False], ["False", "True"]),
        (Value("float64"), [3.0, 12.0], ["3", "12"]),
    ],
    ids=lambda value: str(getattr(value, "dtype", "")) or None,
)
def test_a_label_of_any_kind_is_a_class(tmp_path, kind, labels, names):
    data = write(tmp_path, kind, labels * 10)
    raw = load_raw(data)
    assert raw["train"].features["label"].names == names
    stream = load_stream(DataArguments(dataset=str(tmp_path), streaming=True), "train")
    assert stream.features["label"].names == names
    counts = Counter(label for split in raw.values() for label in split["label"])
    assert counts == {0: 10, 1: 10}


def test_labels_are_compared_by_name_not_by_number_or_type(tmp_path):
    write(tmp_path, Value("float32"), [2.0, 10.0] * 5)
    data = write(tmp_path, Value("string"), ["10", "2", "2"], "test")
    raw = load_raw(data)
    assert raw["train"].features["label"].names == ["2", "10"]
    assert raw["test"]["label"][:] == [1, 0, 0]


@pytest.mark.parametrize("labels", [[-1, -1], [None, None]])
def test_a_test_split_without_labels_does_not_stop_training(tmp_path, labels):
    kind = ClassLabel(names=["cat", "dog"])
    write(tmp_path, kind, [0, 1] * 10)
    data = write(tmp_path, kind, labels, "test")
    assert len(load_split(data, "train", image_processor())) == 15
    with pytest.raises(UserError, match='split "test" of .* has no labels.*--test_split'):
        load_split(data, "test", image_processor())


def test_a_test_split_without_a_label_column_does_not_either(tmp_path):
    write(tmp_path, Value("string"), ["cat", "dog"] * 10)
    features = datasets.Features({"image": datasets.Image()})
    images = [{"bytes": file, "path": None} for _, file in files(seed=500)]
    test = datasets.Dataset.from_dict({"image": images}, features=features)
    test.to_parquet(tmp_path / "test-0.parquet")
    data = DataArguments(dataset=str(tmp_path), validation_size=0.25)
    assert len(load_split(data, "train", image_processor())) == 15
    with pytest.raises(UserError, match='split "test" of .* has no labels'):
        load_split(data, "test", image_processor())


def test_files_of_one_split_that_number_their_classes_differently_are_refused(tmp_path):
    for name in ("configs", "declared", "saved"):
        folder = tmp_path / name
        for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
            kind, labels = ClassLabel(names=names), [0, 1] * 6
            if name == "saved":
                images = [{"bytes": file, "path": None} for _, file in files(seed=50 * number)]
                columns = {"image": images, "label": labels}
                features = Features({"image": datasets.Image(), "label": kind})
                part = datasets.Dataset.from_dict(columns, features=features)
                part.save_to_disk(folder / f"part{number}")
            elif name == "configs" or number == 0:
                parquet(folder / f"train-{number}.parquet", files(seed=50 * number), kind, labels)
    paths = "configs:\n- config_name: a\n  data_files: [{split: train, path: '*.parquet'}]\n"
    (tmp_path / "configs/README.md").write_text(f"---\n{paths}---\n")
    order = "{class_label: {names: {'0': dog, '1': cat}}}"
    (tmp_path / "declared/README.md").write_text(
        f"---\ndataset_info:\n  config_name: a\n  features:\n  - {{name: image, dtype: image}}\n"
        f"  - {{name: label, dtype: {order}}}\n{paths}---\n"
    )
    for name, message in (
        ("configs", "number their classes differently"),
        ("declared", 'number the classes of the column "label" differently'),
        ("saved", "number their classes differently"),
    ):
        with pytest.raises(UserError, match=message):
            load_raw(DataArguments(dataset=str(tmp_path / name), validation_size=0.25))


def test_a_readme_may_rename_classes(tmp_path):
    parquet(tmp_path / "train-0.PARQUET", files(), ClassLabel(names=["0", "1"]), [0, 1] * 6)
    assert classes(DataArguments(dataset=str(tmp_path), validation_size=0.25)) == ["0", "1"]
    (tmp_path / "train-0.PARQUET").rename(tmp_path / "train-0.parquet")
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - {name: image, dtype: image}\n"
        "  - {name: label, dtype: {class_label: {names: {'0': cat, '1': dog}}}}\n"
        "configs:\n- config_name: default\n  data_files: [{split: train, path: '*.parquet'}]\n---\n"
    )
    assert classes(DataArguments(dataset=str(tmp_path), validation_size=0.25)) == ["cat", "dog"]


def test_minus_one_beside_other_numbers_is_refused(tmp_path):
    for labels in ([-1, 0, 1, 2], [-1, 1, 2, 3]):
        with pytest.raises(UserError, match='column "label" contains -1 beside other numbers'):
            load_raw(write(tmp_path, Value("int64"), labels * 5))


@pytest.mark.parametrize(
    ("kind", "labels"),
    [(Value("string"), [f"no. {i}" for i in range(20)]), (Value("float64"), [0.5, 1.0] * 10)],
    ids=["nearly unique", "fractions"],
)
def test_a_column_of_no_classes_is_refused_even_if_named(tmp_path, kind, labels):
    data = write(tmp_path, kind, labels)
    with pytest.raises(UserError, match="no label columns"):
        load_raw(data)
    data.label_column = "label"
    with pytest.raises(UserError, match="no label columns, .*several images share"):
        load_raw(data)


def test_of_several_columns_the_usual_name_is_taken_or_a_choice_asked_for(tmp_path):
    color = (Value("string"), ["red", "blue", "blue", "red"] * 5)
    data = write(tmp_path / "a", Value("string"), ["cat", "dog"] * 10, color=color)
    assert classes(data) == ["cat", "dog"]
    data.label_column = "color"
    assert classes(data) == ["blue", "red"]
    data = write(tmp_path / "b", Value("float64"), [0.5] * 20, color=color, shape=color)
    with pytest.raises(UserError, match="2 label columns, color, shape, .*--label_column"):
        load_raw(data)


def test_a_models_classes_hold_for_a_dataset_with_some_of_them(tmp_path):
    data = write(tmp_path, Value("string"), ["dog", "cat"] * 10, "test")
    names = ["bird", "dog", "cat"]
    split = load_split(data, "test", image_processor(), names)
    assert split.features["label"].names == names
    assert split["label"][:4] == [1, 2, 1, 2]
    with pytest.raises(UserError, match=r'"dog", which is not among .* 2 classes \(bird, cat'):
        load_split(data, "test", image_processor(), ["bird", "cat"])


def test_a_number_outside_the_names_is_no_class():
    kind = ClassLabel(names=["cat", "dog"])
    values = pa.chunked_array([[0, 1], [2, -1, None]])
    assert encode(values, kind, ["cat", "dog"], "train").tolist() == [0, 1, -1, -1, -1]
    assert encode(values, kind, ["dog", "cat"], "train").tolist() == [1, 0, -1, -1, -1]
