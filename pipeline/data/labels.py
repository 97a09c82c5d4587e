"""Find the image and label columns, and map labels of any type to one numbering of the classes.

The classes are those of the train split. Another split may number its labels differently or store
them in another type, so labels are matched by class name, never by number.
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

MISSING = -1  # the label of an unlabeled image, as on the Hub
LABEL_NAMES = {"label", "labels", "class", "class_name", "category", "target", "cls"}
LABEL_TYPES = re.compile(r"(large_)?string|bool|u?int\d+|float\d+")
COUNT_BATCH = 10_000  # rows


def find_columns(dataset: Dataset | IterableDataset, data: DataArguments) -> tuple[str, str]:
    """Return the image and the label column; UserError unless there is exactly one of each.

    A ClassLabel column takes precedence over other types. Among the others, a usual name
    (`LABEL_NAMES`) takes precedence, and a column with fewer than two images per class is ignored.
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
                f"one with --{role}_column. A label is a ClassLabel, or a string or whole number "
                "that several images share."
            )
        chosen += found
    return tuple(chosen)


def class_names(dataset: Dataset | IterableDataset, column: str) -> list[str]:
    """Return a split's class names: as published for a ClassLabel, otherwise in natural order."""
    kind = dataset.features[column]
    if isinstance(kind, ClassLabel):
        return kind.names
    names = {class_name(value) for value in count_values(dataset, column)} - {None}
    if "-1" in names and names != {"-1", "1"} and "string" not in kind.dtype:
        raise UserError(
            f'The column "{column}" contains -1 beside other numbers, and -1 often means "no '
            'label": remove those rows, or use class names instead of numbers.'
        )
    return sorted(names, key=_natural_order)


def class_name(value: str | int | float | bool | None) -> str | None:
    """Return the class name for a plain value: "2" for 2.0; None for a missing value."""
    if value is None or value != value or value == "":  # NaN differs from itself
        return None
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def encode(
    values: pa.ChunkedArray, kind: ClassLabel | Value, names: list[str], split: str
) -> np.ndarray:
    """Return the index in `names` of each label's class, or `MISSING`, as int64 (N,).

    Args:
        values: The labels of a split.
        kind: Their type in that split.
        names: The class names; a UserError reports a class of the split that is not among them.
        split: The split's name, for the error.
    """
    name_of = dict(enumerate(kind.names)).get if isinstance(kind, ClassLabel) else class_name
    numbers = {name: number for number, name in enumerate(names)} | {None: MISSING}
    unique, codes = values.unique(), []
    for name in map(name_of, unique.to_pylist()):
        if name not in numbers and name != str(MISSING):
            raise UserError(
                f'The split "{split}" has images of the class "{name}", which is not among the '
                f"model's {len(names)} classes ({shorten(names)}): remove or relabel those images."
            )
        codes.append(numbers.get(name, MISSING))
    return np.array(codes, np.int64)[pc.index_in(values, unique).to_numpy()]


def count_values(dataset: Dataset | IterableDataset, column: str) -> Counter:
    """Count the values of a column; for a parquet stream, no other column is read."""
    counts = Counter()
    for table in dataset.select_columns([column]).with_format("arrow").iter(COUNT_BATCH):
        for entry in pc.value_counts(table[column]).to_pylist():
            counts[entry["values"]] += entry["counts"]
    return counts


def _are_classes(counts: Counter, least: int) -> bool:
    """Whether values may be classes: at least `least`, two images per class, no fractions."""
    is_fraction = any(isinstance(v, float) and v == v and not v.is_integer() for v in counts)
    values = {class_name(value) for value in counts} - {None}
    return least <= len(values) <= counts.total() / 2 and not is_fraction


def _natural_order(name: str) -> list:
    """Return a key that sorts 2 before 10, and -1 before 0."""
    if re.fullmatch(r"-\d+", name):
        return ["", int(name)]
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
