"""Audit a dataset: duplicates within and across splits, likely label errors, unusual images.

Label errors are found by confident learning (Northcutt et al. 2021, arXiv:1911.00068), on the
probabilities that a logistic regression gives, fitted to the features of other images.
"""

import hashlib
import io
import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import torch
from datasets import Dataset, Features, Value
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from pipeline import runs
from pipeline.data.decoding import decode, hash_file, hash_files, open_image, read_image
from pipeline.data.loading import load_raw
from pipeline.data.sources import Source, load_source
from pipeline.data.splits import class_numbers
from pipeline.errors import UserError, shorten
from pipeline.evaluation.duplicates import SIDE, exact_duplicates, group, near_duplicates
from pipeline.evaluation.outputs import predict
from pipeline.recipe import DataArguments, ModelArguments, load_settings
from pipeline.training.model import build_model, build_processor

DARK, FLAT = 8, 2  # gray levels: the mean of a nearly black image, the deviation in a constant one
FOLDS = 2  # of the cross-validation that gives probabilities
REGULARIZATION = 0.01  # scikit-learn's C of the logistic regression
SHOWN = 30  # entries on a contact sheet
UNUSUAL = ("unreadable", "constant", "nearly_black")
INSPECTED = Features(
    {"thumbnail": datasets.Array3D((3, SIDE, SIDE), "uint8")}
    | dict.fromkeys(("hash", "size", "mode"), Value("string"))
)  # fmt: skip


def audit(
    data: DataArguments, model: str | None = None, image_size: int | None = None
) -> tuple[dict, dict[str, list[tuple[str, Image.Image]]]]:
    """Audit a dataset.

    Args:
        data: The dataset. Images that can't be read are reported.
        model: A backbone or a fine-tuned model, a folder or `id@revision`. It finds further
            candidates for near-duplicates; without it, label errors are not searched for.
        image_size: Side of its input, in pixels (default: the one it was trained with).

    Returns:
        Plain values for JSON, and contact sheets by name: images with their captions.
    """
    source = load_source(data)
    splits = load_raw(source)
    parts = [part.add_column("split", [name] * len(part)) for name, part in splits.items()]
    whole = datasets.concatenate_datasets(parts).cast_column("image", datasets.Image(decode=False))
    table, thumbnails = _inspect(whole, source)
    readable = np.flatnonzero(~table["unreadable"])
    features, errors = None, []
    if model:
        features = _embed(whole.select(readable), model, image_size, source.names)
        found = label_errors(features, table["code"].to_numpy()[readable])
        errors = [
            _entry(table, [readable[i]]) | {"suggested": source.names[other], "probability": p}
            for i, other, p in found
        ]
    pairs, correlations = near_duplicates(thumbnails[readable], features)
    exact = readable[exact_duplicates(table["hash"].to_numpy()[readable])]
    table["group"] = group(np.concatenate([readable[pairs], exact]), len(table))
    near = [
        _entry(table, readable[pair]) | {"correlation": correlation}
        for pair, correlation in zip(pairs, correlations.tolist(), strict=True)
    ]
    report = {
        "dataset": data.dataset,
        "model": model,
        "splits": {name: _describe(table, name, part) for name, part in splits.items()},
        "exact_duplicates": [_entry(table, pair) for pair in exact],
        "near_duplicates": near,
        "near_duplicates_by_split": Counter(" and ".join(sorted({*p["splits"]})) for p in near),
        "label_errors": errors,
    }

    def sheet(entries: list[dict]) -> list[tuple[str, Image.Image]]:
        images = []
        for entry in entries[:: len(entries) // SHOWN + 1]:  # the most confident and the least sure
            guess = f", not {entry['suggested']}?" if "suggested" in entry else ""
            for i, name, label in zip(
                *(entry[k] for k in ("rows", "images", "labels")), strict=True
            ):
                image = open_image(whole[i]["image"], name)
                images.append((f"{name}\n{label}{guess}", image))
        return images

    return report, {
        "near_duplicates": sheet(near),
        "near_duplicates_across_splits": sheet([p for p in near if len({*p["splits"]}) > 1]),
        "near_duplicates_of_other_labels": sheet([p for p in near if len({*p["labels"]}) > 1]),
        "label_errors": sheet(errors),
    }


def label_errors(features: Tensor, codes: np.ndarray) -> list[tuple[int, int, float]]:
    """Find likely label errors by cross-validation, the most likely first.

    Args:
        features: float (N, D).
        codes: Class numbers (N,); negative ones are no label.

    Returns:
        The row of each, the class that is more likely, and the probability of its label.

    Raises:
        UserError: cleanlab is not installed.
    """
    try:
        from cleanlab.filter import find_label_issues  # optional
    except ImportError:
        raise UserError(
            "Label errors are found by cleanlab: .venv/bin/pip install -r requirements-audit.txt."
        ) from None
    rows = np.flatnonzero(codes >= 0)
    classes, labels = np.unique(codes[rows], return_inverse=True)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=REGULARIZATION, max_iter=200))
    options = {"cv": FOLDS, "method": "predict_proba"}
    probs = cross_val_predict(model, features[rows].numpy(), labels, **options)  # (N, C)
    found = find_label_issues(labels, probs, return_indices_ranked_by="self_confidence", n_jobs=1)
    best = classes[probs.argmax(axis=1)]
    return [(int(rows[i]), int(best[i]), float(probs[i, labels[i]])) for i in found]


def duplicate_rows(source: Source, split: str) -> list[int] | None:
    """Return the rows of a split whose near-duplicates are in an earlier one, such as train.

    None if there is no audit of these images in `results/audit`.
    """
    report = runs.read_json(audit_folder(source.data.dataset) / "audit.json")
    entry = report["splits"].get(split) if report and not source.data.streaming else None
    is_same = entry and entry["sha256"] == _hash(load_raw(source)[split])
    return entry["in_earlier_splits"] if is_same else None


def audit_folder(dataset: str) -> Path:
    """Return `results/audit/<name>` of a dataset, a folder or a Hub id."""
    return runs.RESULTS / "audit" / Path(dataset).resolve().name


def as_text(report: dict) -> str:
    """Return the audit as a report to read."""
    lines = [f"Audit of {report['dataset']}", ""]
    for name, split in report["splits"].items():
        lines.append(f"{name}: {split['images']:,} images")
        for key in ("classes", "sizes", "modes"):
            counts = ", ".join(f"{value} {count:,}" for value, count in split[key].items())
            lines.append(f"  {key:10} {counts}")
        lines += [
            f"  {key}: {len(split[key])}, {shorten(split[key])}" for key in UNUSUAL if split[key]
        ]
        share = len(split["in_earlier_splits"]) / split["images"]
        lines.append(f"  duplicates of images in earlier splits: {share:.2%} of the images")
    near = report["near_duplicates"]
    lines += [
        "",
        f"Exact duplicates: {len(report['exact_duplicates']):,} pairs",
        f"Near-duplicates: {len(near):,} pairs",
        *(f"  in {splits}: {n:,}" for splits, n in report["near_duplicates_by_split"].items()),
        f"  of different labels: {sum(len({*pair['labels']}) > 1 for pair in near):,}",
        f"Likely label errors: {len(report['label_errors']):,}"
        if report["model"]
        else "Label errors were not searched for: name a model with MODEL=.",
    ]
    return "\n".join(lines) + "\n"


def _inspect(whole: Dataset, source: Source) -> tuple[pd.DataFrame, Tensor]:
    """What is known of each image, by columns, and its thumbnail, uint8 (N, 3, SIDE, SIDE)."""
    inspected = whole.map(
        _inspect_batch, batched=True, batch_size=100, remove_columns=whole.column_names,
        features=INSPECTED, num_proc=os.cpu_count() if len(whole) > 10_000 else None,
        desc="Reading images",
    )  # fmt: skip
    thumbnails = torch.from_numpy(inspected.with_format("numpy")["thumbnail"][:])
    table = inspected.remove_columns("thumbnail").to_pandas()
    table["split"], table["code"] = whole["split"][:], class_numbers(whole)
    table["label"] = [source.names[code] if code >= 0 else "" for code in table["code"]]
    published = (source.roles.get(split, source.roles.get("train")) for split in table["split"])
    table["name"] = [f"{a} {row}" for a, row in zip(published, whole["row"][:], strict=True)]
    gray = thumbnails.float().mean(dim=1).flatten(1)  # (N, SIDE**2)
    table["unreadable"] = table["mode"] == ""
    table["nearly_black"] = (gray.mean(dim=1) < DARK).numpy() & ~table["unreadable"]
    table["constant"] = (gray.std(dim=1) < FLAT).numpy() & ~table["unreadable"]
    return table, thumbnails


def _inspect_batch(batch: dict) -> dict:
    rows = []
    for cell in batch["image"]:
        try:
            image = open_image(cell, "")
        except UserError:
            rows.append((np.zeros((3, SIDE, SIDE), np.uint8), "", "", ""))
            continue
        thumbnail = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)).transpose(
            2, 0, 1
        )
        size, mode = f"{image.width}x{image.height}", Image.open(io.BytesIO(read_image(cell))).mode
        rows.append((thumbnail, hex(hash_file(size.encode() + image.tobytes())), size, mode))
    columns = dict(zip(INSPECTED, map(list, zip(*rows, strict=True)), strict=True))
    return columns | {"thumbnail": np.stack(columns["thumbnail"])}


def _describe(table: pd.DataFrame, split: str, part: Dataset) -> dict:
    rows, order = table[table["split"] == split], list(table["split"].unique())
    earlier = table["group"][table["split"].isin(order[: order.index(split)])]
    readable = rows[~rows["unreadable"]]
    return {
        "images": len(rows),
        "sha256": _hash(part),
        "classes": rows["label"].value_counts().to_dict(),
        "sizes": readable["size"].value_counts().head(10).to_dict(),
        "modes": readable["mode"].value_counts().to_dict(),
        "in_earlier_splits": np.flatnonzero(rows["group"].isin(earlier)).tolist(),
    } | {kind: rows["name"][rows[kind]].tolist() for kind in UNUSUAL}


def _entry(table: pd.DataFrame, rows) -> dict:
    images = table.iloc[list(rows)]
    columns = {"images": "name", "splits": "split", "labels": "label"}
    return {"rows": [int(row) for row in rows]} | {
        k: images[c].tolist() for k, c in columns.items()
    }


def _embed(images: Dataset, model: str, size: int | None, names: list[str]) -> Tensor:
    """The features of a model's last layer, float32 (N, D)."""
    name, revision = runs.split_revision(model)
    size = size or (load_settings(model) or {}).get("image_size", ModelArguments.image_size)
    arguments = ModelArguments(model=name, model_revision=revision, image_size=size)
    processor = build_processor(arguments)
    decoded = decode(images.select_columns(["image", "label", "row"]), processor)
    return predict(build_model(arguments, names), processor, decoded, depth=1.0)[2]


def _hash(split: Dataset) -> str:
    return hashlib.sha256(hash_files(split).tobytes() + class_numbers(split).tobytes()).hexdigest()
