"""Evaluate a model on a split, and save its metrics with their provenance.

The results contain the hashes of the weights and of the image processor, so that later steps
(card, push, Space) can reject results of another model.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from pipeline import runs
from pipeline.data.decoding import content_hash
from pipeline.data.loading import fingerprint, load_splits
from pipeline.data.sources import Source, load_source
from pipeline.data.transforms import input_size
from pipeline.errors import UserError, shorten
from pipeline.evaluation import ood
from pipeline.evaluation.audit import duplicate_rows
from pipeline.evaluation.calibration import fit_temperature
from pipeline.evaluation.metrics import ImageClassification, reliability, wilson_interval
from pipeline.evaluation.outputs import predict
from pipeline.evaluation.robustness import measure_robustness
from pipeline.recipe import DataArguments, data_arguments, load_settings
from pipeline.training.model import load_model


def evaluate(
    name: str, data: DataArguments, split: str = "test", batch_size: int = 128, bf16: bool = False,
    corruptions: int = 0, ood_datasets: tuple[str, ...] = (),
) -> dict:  # fmt: skip
    """Evaluate a model on one split, in float32.

    Args:
        name: A local folder, or `id@revision` on the Hub.
        data: The dataset.
        split: "test" or "validation".
        batch_size: Batch size per process.
        bf16: Evaluate in bfloat16 if the hardware supports it: a quick estimate, not published.
        corruptions: How many images to measure robustness on.
        ood_datasets: Folders or Hub ids of further OOD images, in addition to the built-in ones.

    Returns:
        Plain values for JSON: the metrics of `ImageClassification`, their provenance, each image's
        prediction and confidence in order, and the settings the model was trained with. If
        measured, also `ood` (see `measure_ood`), `calibration` before and after temperature
        scaling, the accuracy `without_near_duplicates` of an audit, and `robustness`.

    Raises:
        UserError: The model or the dataset can't be loaded, or their classes differ.
    """
    if bf16 and not runs.has_fast_bfloat16():
        bf16 = False
        print("This machine only emulates bfloat16: evaluating in float32.")
    if corruptions < 0:
        raise UserError(f"corruptions is {corruptions}: it must be a number of images, or 0.")
    settings = load_settings(name)
    if data.dataset != "digits":  # load the recorded revision
        revision = runs.pin("dataset", data.dataset, data.dataset_revision)[1]
        data = replace(data, dataset_revision=revision)
    model, processor = load_model(name)
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    source = load_source(data)
    if not set(source.names) <= set(labels):
        raise UserError(
            f'"{name}" classifies {len(labels)} classes ({shorten(labels)}), but the dataset '
            f'"{data.dataset}" has {len(source.names)} ({shorten(source.names)}): use another.'
        )
    _check_same_data(name, settings, source, split)
    others = ood.load_others(ood_datasets, split, processor)
    splits = load_splits(source, processor, split, "validation", names=labels)
    dataset = splits[split]
    if others and "validation" not in splits:
        raise UserError(f'"{data.dataset}" has no validation images, which OOD detection needs.')
    run = partial(predict, model, processor, batch_size=batch_size, bf16=bf16, depth=ood.DEPTH)
    started = time.monotonic()
    logits, truth, _ = test = run(dataset)
    wall = time.monotonic() - started
    duplicates = duplicate_rows(source, split)  # None if there is no audit
    detection = calibration = robustness = None
    if "validation" in splits:  # a dataset with only a test split has none
        validation = run(splits["validation"])
        detection = ood.measure_ood(
            run, processor, validation, test, dataset, split, source.names, others
        )
        folded = getattr(model.config, "calibration_temperature", 1.0)  # see `calibrate_run`
        temperature = fit_temperature(validation[0] * folded, validation[1]) or folded
        calibration = {"temperature": temperature, "folded": folded}
        for key, factor in (("before", folded), ("after", folded / temperature)):
            scores = _scores(logits * factor, truth)
            confidence, predicted = (logits * factor).softmax(dim=1).max(dim=1)
            bins = reliability(confidence.numpy(), (predicted == truth).numpy()).tolist()
            calibration[key] = {"nll": scores["nll"], "ece": scores["ece"], "bins": bins}
    if corruptions:
        part = dataset.shuffle(seed=0).select(range(min(corruptions, len(dataset))))
        robustness = measure_robustness(run, model.device, part)
    hub_name, revision = runs.split_revision(name)
    is_local = runs.is_local(hub_name)
    return {
        "model": {
            "name": hub_name,
            "revision": None if is_local else runs.hub_commit("model", hub_name, revision),
            "sha256": runs.model_hashes(name),
            "parameters": sum(p.numel() for p in model.parameters()),
            "image_size": input_size(processor),
        },
        "dataset": {
            "name": data.dataset,
            "config": data.dataset_config or dataset.info.config_name,
            "revision": data.dataset_revision,
            "image_column": data.image_column,
            "label_column": data.label_column,
            "local": data.dataset != "digits" and runs.is_local(data.dataset),
            "split": split,
            **source.origin(split),
            "images": len(dataset),
            "sha256": content_hash(dataset),
        },
        "labels": labels,
        **_scores(logits, truth),
        "predictions": logits.argmax(dim=1).tolist(),
        "confidences": [round(p, 4) for p in logits.softmax(dim=1).amax(dim=1).tolist()],
        "ood": detection,
        "calibration": calibration,
        "without_near_duplicates": _without(duplicates, logits, truth),
        "robustness": robustness,
        "recipe": settings,
        "dtype": "bfloat16" if bf16 else "float32",
        "wall_s": round(wall, 1),
        "hardware": runs.hardware(),
        "versions": runs.versions(),
        "code_revision": runs.code_revision(),
    }


def save(results: dict, folder: Path) -> None:
    """Save `evaluation_results.json`, and a readable `.txt`, in a run's results folder."""
    runs.write_json(folder / "evaluation_results.json", results)
    (folder / "evaluation_results.txt").write_text(as_text(results), "utf-8")
    files = dict.fromkeys(("evaluation_results.json", "evaluation_results.txt"))
    runs.record_files(folder, files, results["model"]["sha256"]["model.safetensors"])
    runs.link_results(folder, "evaluation_results.txt")


def as_text(results: dict) -> str:
    """Return the results as a readable report."""
    model, dataset, entries = results["model"], results["dataset"], {}
    for name, part, key in (
        ("Accuracy", results, "accuracy"),
        ("Deduplicated", results["without_near_duplicates"], "accuracy"),
        ("Corrupted", results["robustness"], "mean_accuracy"),
    ):
        if part:
            low, high = part[f"{key}_interval"]
            entries[name] = f"{part[key]:.2%}  (95 % interval {low:.2%} to {high:.2%})"
    entries["Balanced"] = f"{results['balanced_accuracy']:.2%}, the mean over classes"
    for name, key in (("Macro-F1", "macro_f1"), ("NLL", "nll"), ("ECE", "ece")):
        entries[name] = f"{results[key]:.4f}"
    if calibration := results["calibration"]:
        before, after = (calibration[key]["ece"] for key in ("before", "after"))
        text = f"{calibration['temperature']:.3f}, ECE {before:.4f} before and {after:.4f} after"
        entries["Temperature"] = text
    if detection := results["ood"]:
        rates = detection["pass_rate"] | detection["ood_datasets"]
        rates = ", ".join(f"{name} {rate:.1%}" for name, rate in rates.items())
        entries["OOD detection"] = f"in-distribution according to {detection['score']}: {rates}"
    entries |= {
        "Model": f"{model['name']}{' @ ' + model['revision'] if model['revision'] else ''}, "
        f"{model['image_size']} px, {model['parameters'] / 1e6:.1f} M parameters",
        "Weights": f"sha256 {model['sha256']['model.safetensors']}",
        "Dataset": f"{dataset['name']}, split {dataset['split']}, {dataset['images']:,} images",
        "Evaluated in": f"{results['wall_s']} s on {results['hardware']}, {results['dtype']}",
    }
    keys = ("precision", "recall", "f1", "support")
    classes = pd.DataFrame({key: results[key] for key in keys}, index=results["labels"])
    lines = [f"{name:15}{text}" for name, text in entries.items()]
    return "\n".join([*lines, "", classes.to_string(float_format="{:.4f}".format), ""])


def _scores(logits: Tensor, labels: Tensor) -> dict:
    metric = ImageClassification(keep_in_memory=True)
    return metric.compute(predictions=logits.numpy(), references=labels.numpy())


def _without(rows: list[int] | None, logits: Tensor, labels: Tensor) -> dict | None:
    """Return the accuracy without the given rows; None if they are unknown, or all."""
    if rows is None:
        return None
    correct = np.delete((logits.argmax(dim=1) == labels).numpy(), rows)
    if not len(correct):
        return None
    interval = wilson_interval(int(correct.sum()), len(correct))
    accuracy = {"accuracy": float(correct.mean()), "accuracy_interval": interval}
    return accuracy | {"removed": len(rows), "images": len(correct)}


def _check_same_data(model: str, settings: dict | None, source: Source, split: str) -> None:
    """Raise UserError if a run's own dataset has changed, since its splits would differ.

    Other columns change a split that is split off train, but not a published one.
    """
    data = source.data
    training = runs.read_json(Path(model).expanduser() / "training.json") or {}
    if not (settings and "data" in training):
        return
    own = data_arguments(model)
    paths = [Path(name).expanduser().resolve() for name in (own.dataset, data.dataset)]
    if own.dataset == data.dataset or (paths[0] == paths[1] and paths[1].is_dir()):
        same = {"dataset": data.dataset, "dataset_revision": data.dataset_revision}
        if split not in source.roles:
            same |= {"image_column": data.image_column, "label_column": data.label_column}
        if replace(own, **same) != data:
            return
        if fingerprint(source) != training["data"]:
            raise UserError(
                f'The images of "{data.dataset}" are not the images that {model} was trained on, '
                "so it may have seen test images: restore the dataset, or train again."
            )
