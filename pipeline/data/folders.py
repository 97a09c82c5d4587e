"""Read a local folder as its splits: image files with their classes, or data files.

`datasets` finds split words in lower case only and anywhere in a name, merges nested class folders,
and drops links and file types that it doesn't know. So the files are listed here: each image is
used, or an error names it.
"""

import glob
import os
from collections import defaultdict
from itertools import takewhile
from pathlib import Path

import datasets
import fsspec
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Value
from datasets.fingerprint import Hasher
from huggingface_hub import HfFileSystem
from PIL import Image

from pipeline.data.splits import SPLIT_WORDS
from pipeline.data.tables import TABLES, ImageFile, read_rows, split_word
from pipeline.errors import UserError, shorten
from pipeline.recipe import DataArguments

Image.init()
READABLE = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
READABLE -= {".eps", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf"}
UNREADABLE = {".heic", ".heif", ".hif", ".jxl", ".svg", ".eps", ".dng", ".cr2", ".nef", ".arw"}
UNREADABLE -= READABLE  # a plugin of Pillow may read them
IMAGES = READABLE | UNREADABLE
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # known without their extension
DATA_FILES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
NOT_IMAGES = {*TABLES, *DATA_FILES, *ARCHIVES, ".txt", ".xml", ".json", ".md", ".npy", ".yaml"}


def load_folder(root: Path, data: DataArguments) -> dict[str, Dataset]:
    """Load a folder's splits, undecoded: images with text columns, or the columns of data files.

    Args:
        root: A folder of images: split folders, class folders and tables (CSV, JSON Lines) that
            name the files, each of them optional; or a folder of parquet, arrow or tar files.
        data: For `label_column` and `streaming`.

    Raises:
        UserError: A file or folder is left over, or it is not clear what it means.
    """
    files = list_files(root)
    paths = [path for path in files if is_image(root, path)]
    packed = {*ARCHIVES, ".tar"} if paths else ARCHIVES
    if archives := [path for path in files if path.suffix.lower() in packed]:
        raise UserError(f'"{root}" holds archives ({shorten(archives)}): unpack and remove them.')
    if paths:
        images = _sort_into_splits(root, paths)
        _label(root, images, files, data.label_column)
        return _as_datasets(root, images)
    splits, kinds = defaultdict(list), set()
    for path in files:
        if path.suffix.lower() in DATA_FILES:
            splits[split_word(path)].append(str(root / path))
            kinds.add(DATA_FILES[path.suffix.lower()])
    if len(kinds) != 1:
        raise UserError(
            f'"{root}" holds {"files of several kinds" if kinds else "no images"}: give it images, '
            "or files of one kind (parquet, arrow or tar)."
        )
    if None in splits and len(splits) > 1:
        raise UserError(
            f"The names of {shorten(splits[None])} do not say to which split they belong: put "
            "train-, validation- or test- in front."
        )
    splits = {split or "train": paths for split, paths in splits.items()}
    return load_files(kinds.pop(), splits, data.streaming)


def list_files(root: Path) -> list[Path]:
    """Return all files below a folder, relative to it, sorted, also those in linked folders."""
    found = [Path(path) for path in glob.glob("**", root_dir=root, recursive=True)]
    found = [path for path in found if not any(part.startswith("__") for part in path.parts)]
    folders = {path for path in found if (root / path).is_dir()}
    files = sorted(set(found) - folders)
    broken = [path for path in files if not (root / path).exists()]
    unreadable = [path for path in files if path.suffix.lower() in UNREADABLE]
    for problem, paths, advice in (
        ("folders are empty", sorted(folders - {path.parent for path in found}), "fill or remove"),
        ("links lead nowhere", broken, "mend or remove"),
        ("Pillow cannot read files", unreadable, "convert to PNG or JPEG"),
    ):
        if paths:
            raise UserError(f'In "{root}", {problem}: {shorten(paths)}; {advice} them.')
    return files


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


def load_files(kind: str, files: dict[str, list[str]], streaming: bool) -> dict[str, Dataset]:
    """Load data files of one kind, each split by itself, whose classes have numbers of its own."""
    splits = {}
    for split, paths in files.items():
        is_local = "://" not in paths[0]  # elsewhere, each footer takes a request
        if kind == "parquet" and is_local and numbers_differ(paths):
            raise UserError(
                f'Files of the split "{split}" number their classes differently: {shorten(paths)}. '
                "Write them with one ClassLabel."
            )
        files = {split: [glob.escape(path) for path in paths]}
        splits[split] = datasets.load_dataset(
            kind, data_files=files, split=split, streaming=streaming
        )
    return splits


def check_all_used(name: str, files: dict[str, list[str]]) -> None:
    """UserError for images that `datasets` leaves out beside those that it lists for the splits."""

    def place(path: str) -> tuple:  # that of the class folder; a figure of the README is elsewhere
        return Path(path).parts[:-2], len(Path(path).parts)

    used = {path for paths in files.values() for path in paths}
    places = {place(path) for path in used if Path(path).suffix.lower() in READABLE}
    if not places:
        return
    if Path(name).is_dir():
        listed = [f"{name}/{path}" for path in list_files(Path(name)) if is_image(Path(name), path)]
    else:  # the URL of each file begins with hf://datasets/OWNER/NAME@COMMIT
        listed = HfFileSystem().find("/".join(min(used).split("/")[:5]))
        listed = [f"hf://{path}" for path in listed if Path(path).suffix.lower() in IMAGES]
    unused = [path for path in listed if path not in used and place(path) in places]
    if unused:
        raise UserError(
            f'"{name}" has {len(unused)} images that `datasets` does not load: {shorten(unused)}. '
            "Correct data_files in its README.md, or load its files from a folder without it."
        )


def numbers_differ(paths: list[str]) -> bool:
    """Whether parquet files number their classes in several ways, as their footers have it."""
    seen = []
    for path in paths:
        with fsspec.open(path, "rb") as file:
            kinds = Features.from_arrow_schema(pq.read_schema(file)).items()
        seen.append({name: kind.names for name, kind in kinds if isinstance(kind, ClassLabel)})
    return any(names != seen[0] for names in seen)


def _sort_into_splits(root: Path, paths: list[Path]) -> list[ImageFile]:
    """Tell split folders and class folders by the places of the images."""
    depth = max(0, min(len(path.parts) for path in paths) - 2)
    around = Path(os.path.commonpath(paths)).parts[:depth]  # folders that hold everything
    start = len([*takewhile(lambda name: name.lower() not in SPLIT_WORDS, around)])
    below = {path: path.parts[start:] for path in paths}
    words = {parts[0] for parts in below.values() if len(parts) > 1}
    words = sorted(word for word in words if word.lower() in SPLIT_WORDS)
    others = [path for path, parts in below.items() if parts[0] not in words]
    if others and any(parts[0] in words and len(parts) > 2 for parts in below.values()):
        raise UserError(
            f'"{root}" has the split folders {", ".join(words)}, and images beside them: '
            f"{shorten(others)}. Put all images into split folders, or none."
        )
    # Without class folders inside, a folder "train" beside others is one of locomotives.
    splits = {} if others else {word: SPLIT_WORDS[word.lower()] for word in words}
    if len(set(splits.values())) < len(splits):
        raise UserError(f'"{root}" has two folders of one split: {", ".join(splits)}. Join them.')
    return [
        ImageFile(path, splits.get(parts[0]), "/".join(parts[bool(splits) : -1]) or None)
        for path, parts in below.items()
    ]


def _label(root: Path, images: list[ImageFile], files: list[Path], column: str | None) -> None:
    """Label images by the tables that name them, or by their class folders."""
    tables = [root / path for path in files if path.suffix.lower() in TABLES]
    used = [path for path in tables if read_rows(root, images, path)]
    if not used and not any(image.folder for image in images):
        beside = sorted(path for path in root.parent.iterdir() if path.suffix.lower() in TABLES)
        used = [path for path in beside if read_rows(root, images, path)]
    listed = [image for image in images if image.row is not None]
    if used:
        _check_rest(root, images, listed, "a row in a table")
    columns = list(dict.fromkeys(name for image in listed for name in image.row))
    by_folder = [all(i.row.get(name) == i.folder for i in listed) for name in columns]
    if not columns or (column == "label" and "label" not in columns) or any(by_folder):
        if nested := [image.path for image in images if "/" in (image.folder or "")]:
            raise UserError(
                f'In "{root}", images lie in folders inside of class folders: {shorten(nested)}. '
                "Put all images of a class into one folder, or give their classes in a CSV."
            )
        _check_rest(root, images, [image for image in images if image.folder], "a class folder")
        for image in images:
            image.row = {"label": image.folder}
    elif column is None and len(folders := {str(image.folder) for image in images}) > 1:
        raise UserError(
            f'"{root}" has class folders ({shorten(sorted(folders))}) and the columns '
            f"{', '.join(columns)} in {used[0]}: choose one with --label_column, or the folders "
            "with --label_column=label."
        )


def _check_rest(root: Path, images: list[ImageFile], known: list[ImageFile], source: str) -> None:
    """UserError unless all images of a split are known, or none of a split other than train."""
    places = {image.path for image in known}
    for split in {image.split for image in images}:
        members = [image.path for image in images if image.split == split]
        unknown = [path for path in members if path not in places]
        if unknown and (len(unknown) < len(members) or split in (None, "train")):
            raise UserError(
                f'In "{root}", {len(unknown)} images have no class: {shorten(unknown)} without '
                f"{source}. Put the images of each class into a folder with its name, or list "
                "file names and classes in a CSV with a row of column names."
            )


def _as_datasets(root: Path, images: list[ImageFile]) -> dict[str, Dataset]:
    """One dataset of paths and text columns per split, in the cache under their fingerprint."""
    splits, files = defaultdict(list), {}
    columns = dict.fromkeys(name for image in images for name in image.row or {})
    for image in images:
        first = files.setdefault((root / image.path).resolve(), image)
        if (first.split, first.row) != (image.split, image.row):
            raise UserError(
                f'In "{root}", {first.path} and {image.path} are one file, in two splits or of two '
                "classes: remove one."
            )
        row = columns | (image.row or {}) | {"image": str(root / image.path)}
        splits[image.split or "train"].append(row)
    features = Features(dict.fromkeys(columns, Value("string")) | {"image": datasets.Image()})
    for split, rows in splits.items():
        stats = [os.stat(row["image"]) for row in rows]
        content = repr((rows, [(stat.st_size, stat.st_mtime_ns) for stat in stats]))
        splits[split] = Dataset.from_generator(
            rows.__iter__, features, split=split, fingerprint=Hasher.hash(content)
        )
    return dict(splits)
