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

MISSING = -1  # the code of an image without a label, as on the Hub
LABEL_NAMES = {"label", "labels", "class", "class_name", "category", "target", "cls"}
COUNT_BATCH = 10_000  # rows


def find_columns(dataset: Dataset | IterableDataset, data: DataArguments) -> tuple[str, str]:
    """Return the image and the label column; UserError unless there is exactly one of each.

    A ClassLabel is taken before a column of other type. Among those, a usual name (`LABEL_NAMES`)
    is taken before others, and a column with fewer than two images a class is none.
    """
    kinds = dataset.features
    image = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    label = [name for name, kind in kinds.items() if isinstance(kind, ClassLabel)]
    if data.label_column is not None:
        label = [name for name, kind in kinds.items() if _can_be_label(kind)]
        if data.label_column in label:
            _check_repeats(dataset, data.label_column)
    elif not label:
        label = [name for name, kind in kinds.items() if _can_be_label(kind) and name[:2] != "__"]
        label = [name for name in label if _repeats(count_values(dataset, name))]
        usual = [name for name in label if name.lower() in LABEL_NAMES]
        label = usual if len(usual) == 1 else label
    return (
        _choose(image, data.image_column, "image", kinds, data.dataset),
        _choose(label, data.label_column, "label", kinds, data.dataset),
    )


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
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def encode(
    values: pa.ChunkedArray, kind: ClassLabel | Value, names: list[str], split: str
) -> np.ndarray:
    """Return the class numbers, int64 (N,), of labels; `MISSING` where there is none.

    Args:
        values: The labels.
        kind: Their type in the split they come from.
        names: The classes in the order of their numbers.
        split: What an error calls the split.

    Raises:
        UserError: A label is of another class.
    """
    own_names = kind.names if isinstance(kind, ClassLabel) else None
    if own_names == names:
        codes = values.fill_null(MISSING).to_numpy()
        return np.where((codes >= 0) & (codes < len(names)), codes, MISSING).astype(np.int64)
    numbers = {name: number for number, name in enumerate(names)}
    lookup = []
    for value in (unique := values.unique()).to_pylist():
        if own_names is not None:
            value = own_names[value] if value is not None and 0 <= value < len(own_names) else None
        name = class_name(value)
        if name not in numbers and name not in (None, str(MISSING)):
            raise UserError(
                f'The split "{split}" has images of the class "{name}", which is not among the '
                f"{len(names)} classes that are trained: {shorten(names)}."
            )
        lookup.append(numbers.get(name, MISSING))
    return np.array(lookup, np.int64)[pc.index_in(values, unique).to_numpy()]


def count_values(dataset: Dataset | IterableDataset, column: str) -> Counter:
    """Count the values of a column; of a parquet stream, no other column is read."""
    counts = Counter()
    for table in dataset.select_columns([column]).with_format("arrow").iter(COUNT_BATCH):
        entries = pc.value_counts(table[column].combine_chunks()).to_pylist()
        counts.update({entry["values"]: entry["counts"] for entry in entries})
    return counts


def _can_be_label(kind) -> bool:
    if isinstance(kind, ClassLabel):
        return True
    types = r"(large_)?string|bool|u?int\d+|float\d+"
    return isinstance(kind, Value) and re.fullmatch(types, kind.dtype) is not None


def _repeats(counts: Counter) -> bool:
    """Whether values may be classes: at least two, of two images each, and no fractions."""
    is_fraction = any(isinstance(v, float) and v == v and not v.is_integer() for v in counts)
    values = [value for value in counts if class_name(value) is not None]
    return 2 * len(values) <= sum(counts.values()) and len(values) > 1 and not is_fraction


def _check_repeats(dataset: Dataset | IterableDataset, column: str) -> None:
    if isinstance(dataset.features[column], ClassLabel):
        return
    counts = count_values(dataset, column)
    if len(counts) > 1 and not _repeats(counts):
        raise UserError(
            f'The column "{column}" has {len(counts)} different values in {counts.total()} rows, '
            "or fractions: they are not classes. Choose another with --label_column."
        )


def _choose(candidates: list[str], name: str | None, role: str, kinds: dict, source: str) -> str:
    columns = ", ".join(f"{column} ({type(kind).__name__})" for column, kind in kinds.items())
    if name is not None and name not in candidates:
        raise UserError(f'"{name}" is not an {role} column of "{source}"; it has {columns}.')
    if not candidates:
        raise UserError(
            f'The dataset "{source}" has no {role} column; it has {columns}. A label is a '
            "ClassLabel, a string or a whole number that several images share."
        )
    if name is None and len(candidates) > 1:
        raise UserError(
            f'The dataset "{source}" has {len(candidates)} {role} columns, '
            f"{', '.join(candidates)}: choose one with --{role}_column."
        )
    return name or candidates[0]


def _natural_order(name: str) -> list:
    """A key that sorts 2 before 10, and -1 before 0."""
    if re.fullmatch(r"-\d+", name):
        return ["", int(name)]
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
