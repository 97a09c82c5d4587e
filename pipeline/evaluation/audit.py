"""Audit a dataset: duplicates within and across splits, likely label errors, unusual images.

Label errors are found by confident learning (Northcutt et al. 2021, arXiv:1911.00068) from
cross-validated probabilities of a logistic regression on image features.
"""

import io
import os
from collections import Counter
from contextlib import suppress
from dataclasses import replace
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
from pipeline.data.decoding import decode, hash_file, open_image, read_image
from pipeline.data.loading import fingerprint, load_raw
from pipeline.data.sources import Source, load_source
from pipeline.data.splits import class_numbers
from pipeline.errors import UserError, shorten
from pipeline.evaluation.duplicates import SIDE, group, near_duplicates
from pipeline.evaluation.outputs import predict
from pipeline.recipe import DataArguments, ModelArguments, load_settings
from pipeline.training.model import build_model, build_processor

DARK, FLAT = 8, 2  # gray levels: mean of a nearly black image, standard deviation of a constant one
REGULARIZATION = 0.01  # C of scikit-learn's logistic regression
SHOWN = 30  # entries on a contact sheet
INSPECTED = Features(
    {"thumbnail": datasets.Array3D((3, SIDE, SIDE), "uint8")}
    | dict.fromkeys(("hash", "size", "mode"), Value("string"))
)


def audit(
    data: DataArguments, model: str | None = None, image_size: int | None = None
) -> tuple[dict, dict[str, list[tuple[str, Image.Image]]]]:
    """Audit a dataset.

    Args:
        data: The dataset. Images that can't be read are reported.
        model: A backbone or fine-tuned model, as a folder or `id@revision`. Without it, label
            errors are not searched for.
        image_size: Side of the model's input, in pixels (default: as in training).

    Returns:
        Plain values for JSON, and contact sheets by name: images with their captions.
    """
    source = load_source(data)
    parts = [part.add_column("split", [key] * len(part)) for key, part in load_raw(source).items()]
    whole = datasets.concatenate_datasets(parts).cast_column("image", datasets.Image(decode=False))
    table, thumbnails = _inspect(whole, source)
    readable = np.flatnonzero(~table["unreadable"])
    features, found, agreement = None, [], None
    if model:
        features = _embed(whole.select(readable), model, image_size, source.names)
        labeled = table.iloc[readable]
        found, predicted = label_errors(features, labeled["code"].to_numpy())
        agrees = (labeled["code"] == predicted)[labeled["code"] >= 0]
        agreement = agrees.groupby(labeled["splits"], sort=False).mean().to_dict()
    pairs, correlations = near_duplicates(thumbnails[readable], features)
    first = pd.Series(readable).groupby(table["hash"].to_numpy()[readable]).transform("first")
    exact = np.stack([first, readable], axis=1)[first != readable]
    table["group"] = group(np.concatenate([readable[pairs], exact]), len(table))

    def entry(rows, **more) -> dict:
        images = table.iloc[rows].reset_index(names="rows")
        return images[["rows", "images", "splits", "labels"]].to_dict("list") | more

    near = zip(readable[pairs], correlations.tolist(), strict=True)
    near = [entry(pair, correlation=correlation) for pair, correlation in near]
    errors = [entry(readable[[i]], suggested=source.names[k], probability=p) for i, k, p in found]
    report = {
        "dataset": data.dataset,
        "fingerprint": fingerprint(source),
        "model": model,
        "splits": _describe(table),
        "exact_duplicates": [entry(pair) for pair in exact],
        "near_duplicates": near,
        "near_duplicates_by_split": Counter(" and ".join(sorted({*p["splits"]})) for p in near),
        "label_errors": errors,
        "label_agreement": agreement,
    }

    def sheet(entries: list[dict]) -> list[tuple[str, Image.Image]]:
        return [
            (f"{name}\n{label}" + (f", not {e['suggested']}?" if "suggested" in e else ""),
             open_image(whole[row]["image"], name))
            for e in entries[:: len(entries) // SHOWN + 1]  # from most to least certain
            for row, name, label in zip(e["rows"], e["images"], e["labels"], strict=True)
        ]  # fmt: skip

    return report, {
        "near_duplicates": sheet(near),
        "near_duplicates_across_splits": sheet([p for p in near if len({*p["splits"]}) > 1]),
        "near_duplicates_of_other_labels": sheet([p for p in near if len({*p["labels"]}) > 1]),
        "label_errors": sheet(errors),
    }


def label_errors(
    features: Tensor, codes: np.ndarray
) -> tuple[list[tuple[int, int, float]], np.ndarray]:
    """Find likely label errors by two-fold cross-validation, the most likely first.

    Args:
        features: float (N, D).
        codes: Class numbers (N,); negative numbers mean no label.

    Returns:
        Each error's row, its most likely class, and the probability of its given label; and the
        predicted class numbers (N,), -1 for images without a label.
    """
    try:
        from cleanlab.filter import find_label_issues  # optional
    except ImportError:
        raise UserError(
            "Finding label errors needs cleanlab: .venv/bin/pip install -r requirements-audit.txt."
        ) from None
    rows = np.flatnonzero(codes >= 0)
    classes, labels = np.unique(codes[rows], return_inverse=True)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=REGULARIZATION, max_iter=200))
    options = {"cv": 2, "method": "predict_proba"}
    probs = cross_val_predict(model, features[rows].numpy(), labels, **options)  # (N, C)
    found = find_label_issues(labels, probs, return_indices_ranked_by="self_confidence", n_jobs=1)
    predicted = np.full(len(codes), -1)
    predicted[rows] = best = classes[probs.argmax(axis=1)]
    return [(int(rows[i]), int(best[i]), float(probs[i, labels[i]])) for i in found], predicted


def duplicate_rows(source: Source, split: str) -> list[int] | None:
    """Return which of a split's images, as decoded, are in an earlier split, by their audit."""
    report = runs.read_json(audit_folder(source.data.dataset) / "audit.json")
    if not report or source.data.streaming:
        return None
    # An audit takes all training images.
    source = replace(source, data=replace(source.data, max_train_samples=None))
    if report["fingerprint"] == fingerprint(source):
        return report["splits"][split]["in_earlier_splits"]
    runs.print_once(
        f'The audit of "{source.data.dataset}" is of other images or splits, so the accuracy '
        "without near-duplicates is not reported: run `make audit` again, with the same MODEL=."
    )
    return None


def audit_folder(dataset: str) -> Path:
    """Return `results/audit/<name>` for a dataset, which is a folder or a Hub id."""
    return runs.RESULTS / "audit" / Path(dataset).resolve().name


def as_text(report: dict) -> str:
    """Return the audit as a readable report."""
    lines, near = [f"Audit of {report['dataset']}"], report["near_duplicates"]
    for name, split in report["splits"].items():
        lines.append(f"\n{name}: {split['images']:,} images")
        for key in ("classes", "sizes", "modes"):
            counts = (f"{value} {count:,}" for value, count in split[key].items())
            lines.append(f"  {key}: {', '.join(counts)}")
        for key, images in split["unusual"].items():
            lines.append(f"  {key}: {len(images)}" + (f" ({shorten(images)})" if images else ""))
        count = len(split["in_earlier_splits"])
        lines.append(f"  also in earlier splits: {count:,} ({count / split['images']:.2%})")
    lines.append(f"\nexact duplicates: {len(report['exact_duplicates']):,} pairs")
    lines.append(f"near-duplicates: {len(near):,} pairs")
    lines += [f"  in {key}: {n:,}" for key, n in report["near_duplicates_by_split"].items()]
    lines.append(f"  with different labels: {sum(len({*pair['labels']}) > 1 for pair in near):,}")
    if agreement := report["label_agreement"]:
        lines.append(f"likely label errors: {len(report['label_errors']):,}")
        shares = ", ".join(f"{share:.1%} in {name}" for name, share in agreement.items())
        lines += [
            f"  labels that the classifier agrees with: {shares}",
            "  Where it agrees with few, the errors are unreliable. Where it agrees with many more",
            "  than in the other splits, the model has memorized the labels, errors included.",
        ]
    else:
        lines.append("likely label errors: set MODEL= to find them")
    return "\n".join([*lines, ""])


def _inspect(whole: Dataset, source: Source) -> tuple[pd.DataFrame, Tensor]:
    """Return a table with the properties of each image, and uint8 thumbnails (N, 3, SIDE, SIDE)."""
    inspected = whole.map(
        _inspect_batch, batched=True, batch_size=100, remove_columns=whole.column_names,
        features=INSPECTED, num_proc=os.cpu_count() if len(whole) > 10_000 else None,
        desc="Reading images",
    )  # fmt: skip
    thumbnails = torch.from_numpy(inspected.with_format("numpy")["thumbnail"][:])
    table = inspected.remove_columns("thumbnail").to_pandas()
    table["splits"], table["code"] = whole["split"][:], class_numbers(whole)
    table["labels"] = [source.names[code] if code >= 0 else "" for code in table["code"]]
    published = (source.roles.get(split, source.roles.get("train")) for split in table["splits"])
    table["images"] = [f"{a} {row}" for a, row in zip(published, whole["row"][:], strict=True)]
    gray = thumbnails.float().mean(dim=1).flatten(1)  # (N, SIDE**2)
    table["unreadable"] = table["mode"] == ""
    table["nearly_black"] = (gray.mean(dim=1) < DARK).numpy() & ~table["unreadable"]
    table["constant"] = (gray.std(dim=1) < FLAT).numpy() & ~table["unreadable"]
    return table, thumbnails


def _inspect_batch(batch: dict) -> dict:
    columns = {name: [] for name in INSPECTED}
    for cell in batch["image"]:
        values = [np.zeros((SIDE, SIDE, 3), np.uint8), "", "", ""]
        with suppress(UserError):
            image = open_image(cell, "")
            size = f"{image.width}x{image.height}"
            small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            values = [np.asarray(small), hex(hash_file(size.encode() + image.tobytes())), size,
                      Image.open(io.BytesIO(read_image(cell))).mode]  # fmt: skip
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return columns | {"thumbnail": np.stack(columns["thumbnail"]).transpose(0, 3, 1, 2)}


def _describe(table: pd.DataFrame) -> dict[str, dict]:
    splits, earlier = {}, set()
    for name, rows in table.groupby("splits", sort=False):
        readable = rows[~rows["unreadable"]]
        unusual = ("unreadable", "nearly_black", "constant")
        splits[name] = {
            "images": len(rows),
            "classes": rows["labels"].value_counts().to_dict(),
            "sizes": readable["size"].value_counts().head(10).to_dict(),
            "modes": readable["mode"].value_counts().to_dict(),
            "unusual": {kind: rows["images"][rows[kind]].tolist() for kind in unusual},
            "in_earlier_splits": np.flatnonzero(readable["group"].isin(earlier)).tolist(),
        }
        earlier |= {*rows["group"]}
    return splits


def _embed(images: Dataset, model: str, size: int | None, names: list[str]) -> Tensor:
    """Return the features of a model's last layer, float32 (N, D)."""
    name, revision = runs.split_revision(model)
    size = size or (load_settings(model) or {}).get("image_size", ModelArguments.image_size)
    arguments = ModelArguments(model=name, model_revision=revision, image_size=size)
    processor = build_processor(arguments)
    decoded = decode(images.select_columns(["image", "label", "row"]), processor)
    return predict(build_model(arguments, names), processor, decoded, depth=1.0)[2]
