"""Read a local folder as its splits: image files with their classes, or data files.

`datasets` finds split words in lower case only and anywhere in a name, merges nested class folders,
and drops links and file types that it doesn't know. So the files are listed here: each image is
used, or an error names it.
"""

import glob
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import datasets
import fsspec
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from pipeline.data.tables import SPLIT_WORDS, TABLES, ImageFile, read_rows, split_word
from pipeline.errors import UserError, shorten
from pipeline.recipe import DataArguments

Image.init()
READABLE = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
READABLE -= {".eps", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf"}
UNREADABLE = {".heic", ".heif", ".hif", ".jxl", ".svg", ".eps", ".dng", ".cr2", ".nef", ".arw"}
UNREADABLE -= READABLE  # a plugin of Pillow may read them
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # known without their extension
DATA_FILES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
NOT_IMAGES = {*TABLES, *DATA_FILES, *ARCHIVES, ".txt", ".xml", ".json", ".md", ".npy", ".yaml"}


def list_files(root: Path) -> list[Path]:
    """Return all files below a folder, relative to it and sorted; linked folders are followed.

    Raises:
        UserError: A folder is empty, or there are image files that can't be read.
    """
    files, empty = [], []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        resolved = Path(folder).resolve()
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith((".", "__"))
            and not resolved.is_relative_to((resolved / name).resolve())
        ]
        names = [name for name in names if name[0] != "."]
        files += [Path(folder, name).relative_to(root) for name in names]
        if not names and not subfolders:
            empty.append(Path(folder).relative_to(root))
    if empty:
        raise UserError(f'In "{root}", folders are empty: {shorten(empty)}. Fill or remove them.')
    if broken := sorted(path for path in files if not (root / path).exists()):
        raise UserError(f'In "{root}", links lead nowhere: {shorten(broken)}. Mend or remove them.')
    if unreadable := sorted(path for path in files if path.suffix.lower() in UNREADABLE):
        raise UserError(
            f'In "{root}", Pillow cannot read {shorten(unreadable)}: convert them to PNG or JPEG.'
        )
    return sorted(files)


def is_image(root: Path, path: Path) -> bool:
    """Whether Pillow reads a file, by its extension or, if that says nothing, by its content."""
    suffix = path.suffix.lower()
    if suffix in READABLE or suffix in NOT_IMAGES:
        return suffix in READABLE
    try:
        with Image.open(root / path, formats=FORMATS):
            return True
    except (OSError, SyntaxError, ValueError):
        return False


def load_folder(root: Path, data: DataArguments) -> dict[str, Dataset]:
    """Load a folder's splits, undecoded.

    Args:
        root: A folder of images: split folders, class folders and tables (CSV, JSON Lines) that
            name the files, each of them optional; or a folder of parquet, arrow or tar files.
        data: For `label_column` and `streaming`.

    Returns:
        Splits by name ("train", "validation", "test"): images with text columns, or the columns of
        the data files.

    Raises:
        UserError: A file or folder is left over, or it is not clear what it means.
    """
    files = list_files(root)
    paths = [path for path in files if is_image(root, path)]
    packed = {*ARCHIVES, ".tar"} if paths else ARCHIVES
    if archives := [path for path in files if path.suffix.lower() in packed]:
        raise UserError(
            f'"{root}" holds archives ({shorten(archives)}): unpack what they hold, and move them '
            "elsewhere."
        )
    if paths:
        images = _sort_into_splits(root, paths)
        _label(root, images, files, data.label_column)
        return _as_datasets(root, images)
    files = [path for path in files if path.suffix.lower() in DATA_FILES]
    kinds = {DATA_FILES[path.suffix.lower()] for path in files}
    if len(kinds) != 1:
        raise UserError(
            f'"{root}" holds {"files of several kinds" if kinds else "no images"}: give it images, '
            "or files of one kind (parquet, arrow or tar)."
        )
    return load_files(kinds.pop(), _split_files(root, files), data.streaming)


def load_files(kind: str, files: dict[str, list[str]], streaming: bool) -> dict[str, Dataset]:
    """Load data files of one kind, each split by itself: its labels may be numbered in its own way.

    Raises:
        UserError: Local parquet files of one split number the classes in several ways.
    """
    for split, paths in files.items():
        if kind != "parquet" or "://" in paths[0]:  # there, each footer takes a request
            continue
        numbering = class_labels(paths[0])
        for path in paths[1:]:
            if class_labels(path) != numbering:
                raise UserError(
                    f'Two files of the split "{split}" number their classes differently: '
                    f"{paths[0]} and {path}. Write them with one ClassLabel."
                )
    return {
        split: datasets.load_dataset(
            kind, data_files={split: [glob.escape(path) for path in paths]}, split=split,
            streaming=streaming,
        )
        for split, paths in files.items()
    }  # fmt: skip


def class_labels(path: str) -> dict[str, list[str]]:
    """Return the names of the classes by column, as the footer of a parquet file has them."""
    with fsspec.open(path, "rb") as file:
        features = Features.from_arrow_schema(pq.read_schema(file))
    return {name: kind.names for name, kind in features.items() if isinstance(kind, ClassLabel)}


def _split_files(root: Path, files: list[Path]) -> dict[str, list[str]]:
    """Data files by split: by a split word in the name of the file or of a folder."""
    splits = defaultdict(list)
    for path in files:
        splits[split_word(path)].append(path)
    if None in splits and len(splits) > 1:
        raise UserError(
            f'In "{root}", the names of {shorten(splits[None])} do not say to which split they '
            "belong: put train-, validation- or test- in front."
        )
    return {name or "train": [str(root / path) for path in splits[name]] for name in splits}


def _sort_into_splits(root: Path, paths: list[Path]) -> list[ImageFile]:
    """Tell split folders and class folders by the places of the images."""
    start, common = 0, paths[0].parts  # `start` folders are around everything
    while all(len(p.parts) > start + 2 and p.parts[start] == common[start] for p in paths):
        if common[start].lower() in SPLIT_WORDS:
            break
        start += 1
    nested = [path for path in paths if len(path.parts) > start + 1]
    words = sorted(
        {path.parts[start] for path in nested if path.parts[start].lower() in SPLIT_WORDS}
    )
    others = [path for path in paths if path.parts[start] not in words]
    if others and any(p.parts[start] in words and len(p.parts) > start + 2 for p in nested):
        raise UserError(
            f'"{root}" has the split folders {", ".join(words)}, and images beside them: '
            f"{shorten(others)}. Put all images into split folders, or none."
        )
    # Without class folders inside, a folder "train" beside others is one of locomotives.
    splits = {} if others else {word: SPLIT_WORDS[word.lower()] for word in words}
    if len(set(splits.values())) < len(splits):
        raise UserError(f'"{root}" has two folders of one split: {", ".join(splits)}. Join them.')
    images = []
    for path in paths:
        folder = "/".join(path.parts[start + bool(splits) : -1])
        images.append(ImageFile(path, splits.get(path.parts[start]), folder or None))
    return images


def _label(root: Path, images: list[ImageFile], files: list[Path], label_column: str | None):
    """Label images by the tables that name them, or by their class folders."""
    tables = [root / path for path in files if path.suffix.lower() in TABLES]
    used = [path for path in tables if read_rows(root, images, path)]
    if not used and not any(image.folder for image in images):
        beside = sorted(path for path in root.parent.iterdir() if path.suffix.lower() in TABLES)
        used = [path for path in beside if read_rows(root, images, path)]
    if used:
        _check_all(root, images, [image.row is not None for image in images], "a row in a table")
    rows = [(image.row, image.folder) for image in images if image.row is not None]
    columns = list(dict.fromkeys(name for row, _ in rows for name in row))
    folders = sorted({str(image.folder) for image in images})
    if (
        not columns
        or (label_column == "label" and "label" not in columns)
        or any(all(row.get(name) == folder for row, folder in rows) for name in columns)
    ):
        _use_folders(root, images)
    elif label_column is None and len(folders) > 1:
        raise UserError(
            f'"{root}" has class folders ({shorten(folders)}) and the columns '
            f"{', '.join(columns)} in {used[0]}: choose one with --label_column, or the folders "
            "with --label_column=label."
        )


def _use_folders(root: Path, images: list[ImageFile]) -> None:
    if nested := [image.path for image in images if "/" in (image.folder or "")]:
        raise UserError(
            f'In "{root}", images lie in folders inside of class folders: {shorten(nested)}. Put '
            "all images of a class into one folder, or give their classes in a CSV."
        )
    _check_all(root, images, [bool(image.folder) for image in images], "a class folder")
    for image in images:
        image.row = {"label": image.folder}


def _check_all(root: Path, images: list[ImageFile], known: list[bool], source: str) -> None:
    """UserError unless all images of a split are known, or none of a split other than train."""
    for split in {image.split for image in images}:
        members = [(image.path, k) for image, k in zip(images, known, strict=True)
                   if image.split == split]  # fmt: skip
        unknown = [path for path, is_known in members if not is_known]
        if unknown and (len(unknown) < len(members) or split in (None, "train")):
            raise UserError(
                f'In "{root}", {len(unknown)} images have no class: {shorten(unknown)} without '
                f"{source}. Put the images of each class into a folder with its name, or list "
                "file names and classes in a CSV with a row of column names."
            )


def _as_datasets(root: Path, images: list[ImageFile]) -> dict[str, Dataset]:
    """One dataset of paths and text columns per split, in the cache under their fingerprint."""
    splits, places = defaultdict(list), {}
    for image in images:
        splits[image.split or "train"].append(image)
        use = (image.split, image.row)
        first = places.setdefault((root / image.path).resolve(), (image.path, use))
        if first[1] != use:
            raise UserError(
                f'In "{root}", {first[0]} and {image.path} are one file, in two splits or of two '
                "classes: remove one."
            )
    columns = dict.fromkeys(name for image in images for name in image.row or {})
    features = Features(dict.fromkeys(columns, Value("string")) | {"image": datasets.Image()})
    published = {}
    for split in sorted(splits, key=["train", "validation", "test"].index):
        rows = [
            dict.fromkeys(columns) | (image.row or {}) | {"image": str(root / image.path)}
            for image in splits[split]
        ]
        stats = [os.stat(row["image"]) for row in rows]
        identity = repr(
            [(row, s.st_size, s.st_mtime_ns) for row, s in zip(rows, stats, strict=True)]
        )
        published[split] = Dataset.from_generator(
            _iterate, features, gen_kwargs={"rows": rows}, split=split,
            fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        )  # fmt: skip
    return published


def _iterate(rows: list[dict]) -> Iterator[dict]:
    yield from rows
