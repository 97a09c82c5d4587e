"""Read a folder of images: which split and which class each file belongs to.

`datasets` finds split words only in lower case and anywhere in a name, merges nested class folders,
and drops links and unknown file types. Files are therefore listed here: each image is either used
or named in an error.
"""

import io
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import datasets
import pandas as pd
from datasets import Dataset, Features, Value
from datasets.fingerprint import Hasher
from PIL import Image

from pipeline.data.labels import class_name
from pipeline.data.splits import SPLIT_WORDS, split_word
from pipeline.errors import UserError, shorten

Image.init()
READABLE = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
READABLE -= {".eps", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf"}
UNREADABLE = {".heic", ".heif", ".hif", ".jxl", ".svg", ".eps", ".dng", ".cr2", ".nef", ".arw"}
UNREADABLE -= READABLE  # a Pillow plugin may read them
IMAGES = READABLE | UNREADABLE
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # found without an extension
TABLES = {".csv", ".tsv", ".jsonl", ".parquet"}
SYSTEM = {"__MACOSX", "__pycache__"}  # folders that no user put there
ARCHIVES = {".zip", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst", ".tar"}
OTHERS = {".arrow", ".txt", ".xml", ".json", ".md", ".npy", ".yaml", *TABLES, *ARCHIVES}


@dataclass
class _ImageFile:
    """An image file, its split, and its label sources."""

    path: Path  # relative to the dataset's folder
    split: str | None
    folder: str | None  # the class folder
    row: dict[str, str | None] | None = None  # its row in a table


def load_images(
    root: Path, paths: list[Path], tables: list[Path], label_column: str | None
) -> dict[str, Dataset]:
    """Load a folder of images, undecoded, as "train", "validation" and "test", or some of them.

    Args:
        root: The folder. It may contain split folders and class folders.
        paths: The images, relative to `root`.
        tables: Files in it that may list images and their labels, relative to `root`.
        label_column: A column of the tables, or "label" for the class folders.

    Raises:
        UserError: A file or folder is unused, or its meaning is ambiguous.
    """
    images = _sort_into_splits(root, paths)
    _label(root, images, [root / path for path in tables], label_column)
    splits, seen = defaultdict(list), {}
    columns = dict.fromkeys(name for image in images for name in image.row or {})
    for image in images:
        first = seen.setdefault((root / image.path).resolve(), image)
        if (first.split, first.row) != (image.split, image.row):
            raise UserError(
                f'In "{root}", {first.path} and {image.path} are one file, but in two splits or '
                "classes: remove one of them."
            )
        row = columns | (image.row or {}) | {"image": str(root / image.path)}
        splits[image.split or "train"].append(row)
    features = Features(dict.fromkeys(columns, Value("string")) | {"image": datasets.Image()})
    for split, rows in splits.items():  # cached by content
        stats = [os.stat(row["image"]) for row in rows]
        content = repr((rows, [(stat.st_size, stat.st_mtime_ns) for stat in stats]))
        splits[split] = Dataset.from_generator(
            rows.__iter__, features, split=split, fingerprint=Hasher.hash(content)
        )
    return dict(splits)


def walk(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield all files and folders below a folder, sorted, except hidden ones; follow links.

    Args:
        folder: Where to look.
        above: Its parent folders with links resolved, where a loop of links ends.
    """
    real = folder.resolve()
    if real in above:
        return
    for path in sorted(folder.iterdir()):
        if not path.name.startswith("."):
            yield path
            if path.is_dir():
                yield from walk(path, (*above, real))


def list_files(root: Path) -> list[Path]:
    """Return all files below a folder, also in linked folders, sorted and relative to it."""
    found = [path.relative_to(root) for path in walk(root)]
    found = [path for path in found if not SYSTEM & {*path.parts}]
    folders = {path for path in found if (root / path).is_dir()}
    files = sorted(set(found) - folders)
    broken = [path for path in files if not (root / path).exists()]
    unreadable = [path for path in files if path.suffix.lower() in UNREADABLE]
    for problem, paths, advice in (
        ("folders are empty", sorted(folders - {path.parent for path in found}), "remove them"),
        ("links are broken", broken, "fix or remove them"),
        ("Pillow cannot read files", unreadable, "convert them to PNG or JPEG"),
    ):
        if paths:
            raise UserError(f'In "{root}", {problem}: {shorten(paths)}; {advice}.')
    return files


def is_image(root: Path, path: Path) -> bool:
    """Return whether Pillow can read a file, by its extension or, if unknown, by its content."""
    suffix = path.suffix.lower()
    if suffix in READABLE or suffix in OTHERS:
        return suffix in READABLE
    try:
        with Image.open(root / path, formats=FORMATS):
            return True
    except (OSError, SyntaxError, ValueError):
        return False


def _sort_into_splits(root: Path, paths: list[Path]) -> list[_ImageFile]:
    """Tell split folders from class folders by the locations of the images."""
    depth = max(0, min(len(path.parts) for path in paths) - 2)
    around = Path(os.path.commonpath(paths)).parts[:depth]  # folders that contain everything
    start = len([*takewhile(lambda name: name.lower() not in SPLIT_WORDS, around)])
    below = {path: path.parts[start:] for path in paths}
    words = {parts[0] for parts in below.values() if len(parts) > 1}
    words = sorted(word for word in words if word.lower() in SPLIT_WORDS)
    others = [path for path, parts in below.items() if parts[0] not in words]
    if others and any(parts[0] in words and len(parts) > 2 for parts in below.values()):
        raise UserError(
            f'"{root}" has the split folders {", ".join(words)}, and images outside them: '
            f"{shorten(others)}. Put all images into split folders, or none of them."
        )
    # Without class folders inside, a folder "train" beside others is a class: the vehicle.
    splits = {} if others else {word: SPLIT_WORDS[word.lower()] for word in words}
    if len(set(splits.values())) < len(splits):
        raise UserError(f'"{root}" has two folders for one split: {", ".join(splits)}. Merge them.')
    return [
        _ImageFile(path, splits.get(parts[0]), "/".join(parts[bool(splits) : -1]) or None)
        for path, parts in below.items()
    ]


def _label(root: Path, images: list[_ImageFile], tables: list[Path], column: str | None) -> None:
    """Label images from the tables that list them, or from their class folders."""
    used = [path for path in tables if _read_rows(root, images, path)]
    if forms := [path for path in used if "submission" in path.stem.lower()]:
        raise UserError(
            f"{forms[0]} looks like a form for predictions, whose labels are placeholders: remove "
            "it, or rename it if its labels are true."
        )
    if not used and not any(image.folder for image in images):
        beside = sorted(path for path in root.parent.iterdir() if path.suffix.lower() in TABLES)
        used = [path for path in beside if _read_rows(root, images, path)]
    listed = [image for image in images if image.row is not None]
    if used:
        _check_rest(root, images, listed, "a row in a table")
    columns = list(dict.fromkeys(name for image in listed for name in image.row))
    by_folder = [all(i.row.get(name) == i.folder for i in listed) for name in columns]
    if not columns or (column == "label" and "label" not in columns) or any(by_folder):
        if nested := [image.path for image in images if "/" in (image.folder or "")]:
            raise UserError(
                f'In "{root}", images are in folders inside class folders: {shorten(nested)}. '
                "Put all images of a class into one folder, or list their classes in a CSV file."
            )
        _check_rest(root, images, [image for image in images if image.folder], "a class folder")
        for image in images:
            image.row = {"label": image.folder}
    elif column is None and len(folders := {str(image.folder) for image in images}) > 1:
        raise UserError(
            f'"{root}" has class folders ({shorten(sorted(folders))}) and the columns '
            f"{', '.join(columns)} in {used[0]}: choose a column with --label_column, or the "
            "folders with --label_column=label."
        )


def _check_rest(root: Path, images: list[_ImageFile], known: list[_ImageFile], source: str) -> None:
    """Raise UserError unless every image in a split is labeled; only train needs any labels."""
    places = {image.path for image in known}
    for split in {image.split for image in images}:
        members = [image.path for image in images if image.split == split]
        unknown = [path for path in members if path not in places]
        if unknown and (len(unknown) < len(members) or split in (None, "train")):
            raise UserError(
                f'In "{root}", {len(unknown)} images have no class: {shorten(unknown)} (without '
                f"{source}). Put the images of each class into a folder named after it, or list "
                "file names and classes in a CSV file with a header row."
            )


def _read_rows(root: Path, images: list[_ImageFile], path: Path) -> bool:
    """Assign the rows of a table to images; return False if the table does not list images."""
    table = _read_table(path)
    index = defaultdict(dict)  # images by every name that a table may use for them
    for image in images:
        inside = Path(*image.path.parts[bool(image.split) :])
        for name in (root / image.path, image.path, inside, inside.name, inside.stem):
            index[str(name)][image.path] = image

    def find(name: str | None) -> list[_ImageFile]:
        name = (name or "").replace("\\", "/")
        found = index.get(os.path.normpath(path.parent / name)) or index.get(os.path.normpath(name))
        return list((found or {}).values())

    hits = {column: sum(bool(find(name)) for name in table[column]) for column in table.columns}
    # Of columns that match equally, the one with more different values: 0 and 1 may be stems too.
    ranks = {column: (count, table[column].nunique()) for column, count in hits.items()}
    file_column = "file_name" if "file_name" in hits else max(ranks, key=ranks.get, default=None)
    if not hits or not hits[file_column] or 2 * hits[file_column] < len(table):
        return False
    split_column = next((column for column in hits if column.lower() == "split"), None)
    is_inside = path.is_relative_to(root) and split_column is None
    split_of_all = split_word(path.relative_to(root)) if is_inside else None
    missing = []
    for row in table.to_dict("records"):
        name, word = row.pop(file_column), row.pop(split_column, None)
        split = SPLIT_WORDS.get(word.lower()) if word else split_of_all
        if word and split is None:
            raise UserError(f'{path} has the split "{word}": use train, validation or test.')
        found = [image for image in find(name) if not split or image.split in (None, split)]
        if len(found) > 1:
            places = shorten([image.path for image in found])
            raise UserError(f'"{name}" in {path} may be any of {places}: use the full path.')
        if found and found[0].row not in (None, row):
            raise UserError(f'"{name}" has two different rows, one in {path}: remove one.')
        if found:
            found[0].row, found[0].split = row, split or found[0].split
        else:
            missing.append(name)
    if missing:
        raise UserError(
            f"{path} lists {len(missing)} images that are not in this split or folder: "
            f"{shorten(missing)}. Remove the rows or add the images."
        )
    return True


def _read_table(path: Path) -> pd.DataFrame:
    """Read a table as text, to keep 007 and NA unchanged; missing values are None."""
    try:
        if path.suffix.lower() == ".parquet":
            table = pd.read_parquet(path)
        elif path.suffix.lower() == ".jsonl":
            table = pd.read_json(path, lines=True, dtype=False, convert_dates=False)
        else:
            text = path.read_text("utf-8-sig")
            separator = max(",;\t", key=text.partition("\n")[0].count)
            table = pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:
        raise UserError(f"Cannot read {path}: {' '.join(str(error).split())}") from None
    return table.astype(object).map(class_name)
