"""Find the image and the label column, and bring labels of every kind to one numbering of classes.

The classes are those of the train split. Another split may number or type its labels in its own
way: labels are compared by the class's name, never by its number.
"""

import re
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, IterableDataset, Value

from pipeline.errors import UserError, shorten
from pipeline.recipe import DataArguments

MISSING = -1  # the number of an image without a label, as on the Hub
LABEL_NAMES = {"label", "labels", "class", "class_name", "category", "target", "cls"}
LABEL_TYPES = re.compile(r"(large_)?string|bool|u?int\d+|float\d+")
COUNT_BATCH = 10_000  # rows


def find_columns(dataset: Dataset | IterableDataset, data: DataArguments) -> tuple[str, str]:
    """Return the image and the label column; UserError unless there is exactly one of each.

    A ClassLabel is taken before a column of other type. Among those, a usual name (`LABEL_NAMES`)
    is taken before others, and a column with fewer than two images a class is none.
    """
    kinds, wanted = dataset.features, data.label_column
    images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in kinds.items() if isinstance(kind, ClassLabel)]
    if not labels or wanted not in (None, *labels):
        values = {name: kind for name, kind in kinds.items() if isinstance(kind, Value)}
        values = [name for name, kind in values.items() if LABEL_TYPES.fullmatch(kind.dtype)]
        values = [name for name in values if name == wanted or not (wanted or name[:2] == "__")]
        least = 1 if wanted else 2
        labels = [name for name in values if _are_classes(count_values(dataset, name), least)]
        usual = [name for name in labels if name.lower() in LABEL_NAMES]
        labels = usual if len(usual) == 1 else labels
    chosen = []
    for role, found, name in (("image", images, data.image_column), ("label", labels, wanted)):
        found = [name] if name in found else found
        if len(found) != 1 or name not in (None, *found):
            listed = ", ".join([f"{len(found) or 'no'} {role} columns", *found])
            columns = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in kinds.items())
            raise UserError(
                f'The dataset "{data.dataset}" has {listed}, among its columns {columns}: choose '
                f"one with --{role}_column. A label is a ClassLabel, a string or a whole "
                "number that several images share."
            )
        chosen += found
    return tuple(chosen)


def class_names(dataset: Dataset | IterableDataset, column: str) -> list[str]:
    """Return the classes of a split: as published for a ClassLabel, otherwise in natural order."""
    kind = dataset.features[column]
    if isinstance(kind, ClassLabel):
        return kind.names
    names = {class_name(value) for value in count_values(dataset, column)} - {None}
    if {"-1", "0"} <= names and kind != Value("string"):
        raise UserError(
            f'The column "{column}" holds -1 beside 0, which often means "no label": leave those '
            "rows out, or give the classes names in place of numbers."
        )
    return sorted(names, key=_natural_order)


def class_name(value: str | int | float | bool | None) -> str | None:
    """Return the name of the class that a plain value means: 2.0 is "2"; None if it is missing."""
    if value is None or value != value or value == "":  # NaN differs from itself
        return None
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def encode(
    values: pa.ChunkedArray, kind: ClassLabel | Value, names: list[str], split: str
) -> np.ndarray:
    """Return the number in `names` of the class of each label, int64 (N,), or `MISSING`.

    Args:
        values: The labels of a split.
        kind: Their type in it.
        names: The classes; a UserError says which class of the split is not among them.
        split: The split's name.
    """
    name_of = dict(enumerate(kind.names)).get if isinstance(kind, ClassLabel) else class_name
    numbers = {name: number for number, name in enumerate(names)} | {None: MISSING}
    unique, codes = values.unique(), []
    for name in map(name_of, unique.to_pylist()):
        if name not in numbers and name != str(MISSING):
            raise UserError(
                f'The split "{split}" has images of the class "{name}", which is not among the '
                f"{len(names)} classes that are trained: {shorten(names)}."
            )
        codes.append(numbers.get(name, MISSING))
    return np.array(codes, np.int64)[pc.index_in(values, unique).to_numpy()]


def count_values(dataset: Dataset | IterableDataset, column: str) -> Counter:
    """Count the values of a column; of a parquet stream, no other column is read."""
    counts = Counter()
    for table in dataset.select_columns([column]).with_format("arrow").iter(COUNT_BATCH):
        for entry in pc.value_counts(table[column]).to_pylist():
            counts[entry["values"]] += entry["counts"]
    return counts


def _are_classes(counts: Counter, least: int) -> bool:
    """Whether values may be classes: `least` different ones, of two images each, no fractions."""
    is_fraction = any(isinstance(v, float) and v == v and not v.is_integer() for v in counts)
    values = {class_name(value) for value in counts} - {None}
    return least <= len(values) <= counts.total() / 2 and not is_fraction


def _natural_order(name: str) -> list:
    """A key that sorts 2 before 10, and -1 before 0."""
    if re.fullmatch(r"-\d+", name):
        return ["", int(name)]
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
