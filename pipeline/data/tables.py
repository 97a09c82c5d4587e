"""Read tables (CSV, TSV, JSON Lines, parquet) that name image files, and say more of each."""

import io
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pipeline.data.labels import class_name
from pipeline.data.splits import SPLIT_WORDS
from pipeline.errors import UserError, shorten

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass
class ImageFile:
    """An image with what is known of it."""

    path: Path  # below the folder
    split: str | None
    folder: str | None  # the class folder
    row: dict[str, str | None] | None = None  # of a table


def split_word(path: Path) -> str | None:
    """Return the split that a file's path names; UserError if it names several."""
    words = re.split(r"[/._-]", str(path).lower())
    splits = sorted({SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS})
    if len(splits) > 1:
        raise UserError(f'The file "{path}" has several splits in its name: {", ".join(splits)}.')
    return splits[0] if splits else None


def read_rows(root: Path, images: list[ImageFile], path: Path) -> bool:
    """Give images their rows of a table; False if the table does not name images."""
    table = _read_table(path)
    index = defaultdict(dict)  # images by each name that a table may give them
    for image in images:
        inside = Path(*image.path.parts[bool(image.split) :])
        for name in (root / image.path, image.path, inside, inside.name, inside.stem):
            index[str(name)][image.path] = image

    def find(name: str | None) -> list[ImageFile]:
        name = (name or "").replace("\\", "/")
        found = index.get(os.path.normpath(path.parent / name)) or index.get(os.path.normpath(name))
        return list((found or {}).values())

    hits = {column: sum(bool(find(name)) for name in table[column]) for column in table.columns}
    file_column = "file_name" if "file_name" in hits else max(hits, key=hits.get, default=None)
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
            raise UserError(f'{path} has the split "{word}": write train, validation or test.')
        found = [image for image in find(name) if not split or image.split in (None, split)]
        if len(found) > 1:
            places = shorten([image.path for image in found])
            raise UserError(f'"{name}" in {path} may be any of {places}: write the whole path.')
        if found and found[0].row not in (None, row):
            raise UserError(f'"{name}" has a second, different row in {path}: remove one.')
        if found:
            found[0].row, found[0].split = row, split or found[0].split
        else:
            missing.append(name)
    if missing:
        raise UserError(
            f"{path} names {len(missing)} images that are not in this split or folder: "
            f"{shorten(missing)}. Remove the rows, or add the images."
        )
    return True


def _read_table(path: Path) -> pd.DataFrame:
    """A table as text, so that 007 and NA stay what they are; None where a value is missing."""
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
