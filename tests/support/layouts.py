"""Datasets on disk, in the layouts that people have: each writes its files and says what they are.

A function takes an empty folder and returns either what is to be loaded, as a Counter of (split,
class, hash of the image file), or the sentence that refuses it, as a pattern.
"""

import csv
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, Features, Value

from pipeline.data.decoding import hash_file
from samples import draw_image

Images = list[tuple[str, bytes]]  # class and file


def files(classes: str = "cat dog", count: int = 6, kind: str = "png", seed: int = 0) -> Images:
    """Return `count` images of each class, one class after the other, none equal to another."""
    images = []
    for name in classes.split():
        for _ in range(count):
            buffer = io.BytesIO()
            draw_image(seed + len(images), (40, 30)).save(buffer, kind)
            images.append((name, buffer.getvalue()))
    return images


def expect(**splits: Images) -> Counter:
    return Counter(
        (split, label, hash_file(file))
        for split, images in splits.items()
        for label, file in images
    )


def put(folder: Path, images: Images, pattern: str = "{label}/{i}.png") -> list[str]:
    """Write images; return their paths below `folder`. The pattern knows `label` and `i`."""
    paths = [pattern.format(label=label, i=i) for i, (label, _) in enumerate(images)]
    for path, (_, file) in zip(paths, images, strict=True):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(file)
    return paths


def table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
        return
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def parquet(path: Path, images: Images, kind, values: list, **more: tuple) -> None:
    """Write a parquet file with the columns `image`, `label` and more as (kind, values)."""
    columns = {"image": [{"bytes": file, "path": None} for _, file in images], "label": values}
    features = {"image": datasets.Image(), "label": kind}
    for name, (other, cells) in more.items():
        columns[name], features[name] = cells, other
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns, features=Features(features)).to_parquet(path)


def three() -> tuple[Images, Images, Images]:
    return files(), files(count=2, seed=100), files(count=3, seed=200)


def class_folders(folder):
    put(folder, train := files())
    return expect(train=train)


def split_folders(folder, names=("train", "val", "test")):
    splits = dict(zip(("train", "validation", "test"), three(), strict=True))
    for name, images in zip(names, splits.values(), strict=True):
        put(folder / name, images)
    return expect(**splits)


def capitalized_split_folders(folder):
    return split_folders(folder, ("Train", "Val", "TEST"))


def long_split_folders(folder):
    return split_folders(folder, ("Training", "Validation", "Testing"))


def split_words_in_class_names(folder):
    images = files("train_tickets lab_test val dev.kits")
    images = [(label.replace("_", " "), file) for label, file in images]
    put(folder, images)
    return expect(train=images)


def split_words_in_file_names(folder):
    images = files()
    put(folder, images[::2], "{label}/test_{i}.png")
    put(folder, images[1::2], "{label}/{i} train.png")
    return expect(train=images)


def split_words_inside_splits(folder):
    train, test = files("test_lab val_lab"), files("test_lab val_lab", seed=100)
    put(folder / "train", train, "{label}/dev-{i}.png")
    put(folder / "test", test, "{label}/train-{i}.png")
    return expect(train=train, test=test)


def linked_class_folder(folder):
    images = files()
    put(folder, images[:6])
    put(folder.parent / "elsewhere", images[6:], "{i}.png")
    (folder / "dog").symlink_to(folder.parent / "elsewhere")
    return expect(train=images)


def broken_link(folder):
    put(folder, files())
    (folder / "cat" / "9.png").symlink_to(folder / "nowhere.png")
    return r"links are broken: cat/9\.png"


def avif(folder):
    put(folder, images := files(kind="avif"), "{label}/{i}.avif")
    return expect(train=images)


def odd_extensions(folder):
    png, jpeg = files(), files("cat dog bird", kind="jpeg", seed=100)
    put(folder, png, "{label}/{i}.Png")
    put(folder, jpeg[:6], "{label}/{i}")
    put(folder, jpeg[6:], "{label}/{i}.jpg.1")
    (folder / "cat" / "notes.doc").write_text("no image")
    (folder / "cat" / ".DS_Store").write_text("no image")
    return expect(train=png + jpeg)


def heic(folder):
    put(folder, files())
    (folder / "dog" / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    return r"cannot read files: dog/phone\.HEIC; convert"


def wrapped(folder):
    train, test = files(), files(seed=100)
    put(folder / "pets" / "images" / "train", train)
    put(folder / "pets" / "images" / "test", test)
    return expect(train=train, test=test)


def nested_classes(folder):
    put(folder, files(), "animals/{label}/{i}.png")
    put(folder, files("rose"), "plants/{label}/{i}.png")
    return "folders inside class folders: animals/cat/0.png"


def class_before_split(folder):
    put(folder, files(), "{label}/train/{i}.png")
    put(folder, files(seed=100), "{label}/test/{i}.png")
    return "folders inside class folders: cat/test/0.png"


def empty_class_folder(folder):
    put(folder, files())
    (folder / "bird").mkdir()
    return "folders are empty: bird"


def images_beside_splits(folder):
    put(folder / "train", files())
    put(folder / "more", files(seed=100))
    return "split folders train, and images outside them: more/cat/0.png"


def images_outside_class_folders(folder):
    put(folder, files())
    put(folder, files("cat", seed=100), "{i}.png")
    return r"6 images have no class: 0\.png"


def two_folders_of_one_split(folder):
    put(folder / "train", files())
    put(folder / "val", files(seed=100))
    put(folder / "dev", files(seed=200))
    return "two folders for one split: dev, .*val"


def file_in_two_splits(folder):
    put(folder / "train", files())
    put(folder / "test", files(count=2, seed=100))
    (folder / "test" / "cat" / "same.png").symlink_to(folder / "train" / "cat" / "0.png")
    return r"test/cat/same\.png and train/cat/0\.png are one file"


def class_only_in_test(folder):
    put(folder / "train", files())
    put(folder / "test", files("cat bird", seed=100))
    return 'split "test" has images of the class "bird".*.cat, dog'


def classes_named_by_numbers(folder):
    images = files(" ".join(map(str, range(12))), count=3)
    put(folder, images)
    return expect(train=images)


def odd_path(folder):
    folder = folder / "my [1] pets@home, 100% & 犬"
    put(folder / "train", images := files("犬 $1 a*b"))
    return expect(train=images)


def metadata_csv(folder):
    images = files("NA 007", seed=50)
    paths = put(folder, images, "{i}.png")
    rows = [{"file_name": p, "label": label} for p, (label, _) in zip(paths, images, strict=True)]
    table(folder / "metadata.csv", rows)
    return expect(train=images)


def metadata_jsonl_in_each_split(folder):
    splits = dict(zip(("train", "test"), three()[:2], strict=True))
    for split, images in splits.items():
        paths = put(folder / split, images, "{i}.png")
        cells = [{"cat": 3, "dog": 10}[label] for label, _ in images]
        rows = [{"file_name": p, "label": c} for p, c in zip(paths, cells, strict=True)]
        table(folder / split / "metadata.jsonl", rows)
    numbers = {"cat": "3", "dog": "10"}
    splits = {s: [(numbers[label], f) for label, f in images] for s, images in splits.items()}
    return expect(**splits)


def flat_splits_and_csv(folder, where="labels.csv"):
    splits = dict(zip(("train", "validation", "test"), three(), strict=True))
    rows = []
    for name, (split, images) in zip(("Train", "Val", "Test"), splits.items(), strict=True):
        paths = put(folder / name, images, f"{split[:2]}_{{i}}.png")
        rows += [{"image": p, "breed": k} for p, (k, _) in zip(paths, images, strict=True)]
    table(folder / where, rows)
    return expect(**splits)


def csv_beside_the_folder(folder):
    folder = folder / "pets"
    folder.mkdir()
    return flat_splits_and_csv(folder, "../pets.csv")


def csv_with_ids_and_splits(folder):
    splits = dict(zip(("train", "validation", "test"), three(), strict=True))
    rows = []
    for start, (split, images) in enumerate(splits.items()):
        paths = put(folder / "images", images, f"{start}{{i:04}}.jpg")
        rows += [
            {"id": p.removesuffix(".jpg"), "label": label, "split": split[:4].title()}
            for p, (label, _) in zip(paths, images, strict=True)
        ]
    for row in rows:
        row["split"] = row["split"].replace("Vali", "Val").replace("Trai", "Train")
    table(folder / "labels.csv", rows)
    return expect(**splits)


def unlabeled_test_images(folder):
    train, test = files(), files(count=3, seed=100)
    paths = put(folder / "train", train, "{i}.png")
    put(folder / "test", test, "t{i}.png")
    rows = [{"id": p, "label": label} for p, (label, _) in zip(paths, train, strict=True)]
    table(folder / "train.csv", rows)
    return expect(train=train, test=[(None, file) for _, file in test])


def image_without_a_row(folder):
    metadata_csv(folder)
    put(folder, files("cat", 1, seed=90), "extra.png")
    return r"1 images have no class: extra\.png"


def row_without_an_image(folder):
    metadata_csv(folder)
    (folder / "3.png").unlink()
    return r"metadata\.csv lists 1 images .*: 3\.png"


def name_in_two_splits_of_a_csv(folder):
    for split, images in zip(("Train", "Test"), three()[:2], strict=True):
        put(folder / split, images, "{i}.png")
    table(folder / "labels.csv", [{"image": f"{i}.png", "label": i % 2} for i in range(12)])
    return r'"0\.png" in .*labels\.csv may be any of Test/0\.png, Train/0\.png'


def class_folders_and_a_csv(folder):
    paths = put(folder, files())
    rows = [{"file": p, "color": "red" if i % 2 else "blue"} for i, p in enumerate(paths)]
    table(folder / "colors.csv", rows)
    return "class folders .cat, dog. and the columns color in .*colors.csv: choose"


def class_folders_and_their_csv(folder):
    paths = put(folder, images := files())
    rows = [{"file": p, "kind": k} for p, (k, _) in zip(paths, images, strict=True)]
    table(folder / "index.csv", rows)
    return expect(train=images)


def parquet_numbered_differently(folder):
    train, test, _ = three()
    names = ["cat", "dog"]
    numbers = [names.index(label) for label, _ in train]
    parquet(folder / "data/train-0.parquet", train, ClassLabel(names=names), numbers)
    numbers = [names[::-1].index(label) for label, _ in test]
    parquet(folder / "data/test-0.parquet", test, ClassLabel(names=names[::-1]), numbers)
    return expect(train=train, test=test)


def parquet_files_numbered_differently(folder):
    kind, images = ClassLabel(names=["cat", "dog"]), files()
    parquet(folder / "train-0.parquet", images, kind, [0, 1] * 6)
    parquet(folder / "train-1.parquet", images, ClassLabel(names=["dog", "cat"]), [0, 1] * 6)
    return r'files of the split "train" number .*train-0.parquet, .*train-1.parquet'


def parquet_in_capitals(folder):
    train, _, test = three()
    for name, images in (("Train", train), ("TEST", test)):
        labels = [label for label, _ in images]
        parquet(folder / f"{name}.parquet", images, Value("string"), labels)
    return expect(train=train, test=test)


def parquet_of_no_split(folder):
    for name in ("train", "rest"):
        parquet(folder / f"pets_{name}.parquet", files(), Value("int64"), [0, 1] * 6)
    return r"file names .*pets_rest\.parquet do not say which split"


def parquet_with_an_id(folder):
    images = files()
    ids = [f"no. {i}" for i in range(12)]
    kind, labels = Value("string"), [label for label, _ in images]
    parquet(folder / "a.parquet", images, kind, labels, id=(kind, ids))
    return expect(train=images)


def parquet_with_an_id_only(folder):
    parquet(folder / "a.parquet", files(), Value("string"), [str(i) for i in range(12)])
    return "has no label columns, among its columns image .Image., label .Value."


def readme(folder, **patterns: str) -> None:
    """Write a README.md that says which files make up the splits, as on the Hub."""
    files = "".join(f"  - split: {split}\n    path: '{p}'\n" for split, p in patterns.items())
    text = f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n# Pets\n"
    (folder / "README.md").write_text(text, "utf-8")


def readme_and_images(folder):
    train, test = files(), files(seed=100)
    put(folder / "a", train)
    put(folder / "b", test)
    put(folder, files("figures", 1, seed=200), "{label}/{i}.png")
    readme(folder, train="a/**", test="b/**")
    return expect(train=train, test=test)


def readme_and_images_that_are_dropped(folder):
    put(folder / "a", files())
    put(folder / "a", files("bird", seed=100, kind="avif"), "{label}/{i}.avif")
    readme(folder, train="a/**")
    return r"6 images that `datasets` does not load: .*bird/0\.avif"


def readme_with_a_file_in_two_splits(folder):
    parquet(folder / "all.parquet", files(), Value("int64"), [0, 1] * 6)
    readme(folder, train="*.parquet", test="all*")
    return r"all\.parquet is in two splits, train and test"


def readme_and_parquet_numbered_differently(folder):
    expected = parquet_numbered_differently(folder)
    readme(folder, train="data/train*", test="data/test*")
    return expected


def web_dataset(folder):
    images = files("0 1 2 10", count=3)
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "train-000.tar", "w") as tar:
        for i, (label, file) in enumerate(images):
            for suffix, content in (("png", file), ("cls", label.encode())):
                info = tarfile.TarInfo(f"{i:04}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return expect(train=images)


def saved_to_disk(folder):
    images = files()
    cells = [{"bytes": file, "path": None} for _, file in images]
    columns = {"image": cells, "label": [label for label, _ in images]}
    features = Features({"image": datasets.Image(), "label": Value("string")})
    train = Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": train}).save_to_disk(folder)
    return expect(train=images)


def archive_beside_images(folder):
    put(folder, files())
    (folder / "more.tar").write_bytes(b"")
    return r"holds archives \(more\.tar\): unpack"


def archive(folder):
    (folder / "pets.zip").write_bytes(b"PK")
    return r"holds archives \(pets\.zip\): unpack"


def train_and_validation(folder):
    train, second, _ = three()
    put(folder / "train", train)
    put(folder / "val", second)
    return expect(train=train, test=second)


def test_only(folder):
    put(folder / "test", images := files())
    return expect(test=images)


test_only.__test__ = False

LAYOUTS: list[Callable[[Path], Counter | str]] = [
    value
    for value in list(globals().values())
    if callable(value) and getattr(value, "__module__", None) == __name__
    and value not in (files, expect, put, table, parquet, three, readme)
]  # fmt: skip
