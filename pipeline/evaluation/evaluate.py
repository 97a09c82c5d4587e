"""Evaluate a model on a split, and save its metrics with their provenance.

The results carry the hashes of the weights and of the image processor, so that whatever is made
of them later (card, push, Space) can refuse another model's.
"""

import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pipeline import runs
from pipeline.data.decoding import DecodedImages, content_hash
from pipeline.data.loading import fingerprint, load_source, load_splits
from pipeline.data.transforms import input_size, preprocess
from pipeline.errors import UserError
from pipeline.evaluation import ood
from pipeline.evaluation.metrics import ImageClassification
from pipeline.recipe import DataArguments, data_arguments, load_settings
from pipeline.training.model import load_model


def evaluate(
    name: str,
    data: DataArguments,
    split: str = "test",
    batch_size: int = 128,
    bf16: bool = False,
) -> dict:
    """Evaluate a model on one split, in float32.

    Args:
        name: A local folder, or `id@revision` on the Hub.
        data: The dataset.
        split: "test" or "validation".
        batch_size: Images at once in each process.
        bf16: Evaluate in bfloat16 where that is fast: for a quick look, not to be published.

    Returns:
        Plain values for JSON: the metrics of `ImageClassification`, what they were computed from,
        each image's prediction and confidence in order, `ood` (see `measure_ood`), and the
        settings the model was trained with, where they are known.

    Raises:
        UserError: The model or the dataset can't be loaded, or their classes differ.
    """
    if bf16 and not runs.has_fast_bfloat16():
        bf16 = False
        print("This processor emulates bfloat16: evaluating in float32.")
    settings = load_settings(name)
    data = replace(data, dataset_revision=_dataset_revision(data))  # what is recorded is loaded
    model, processor = load_model(name)
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    source = load_source(data)
    if not set(source.names) <= set(labels):
        raise UserError(
            f'"{name}" classifies {_list_classes(labels)}; the dataset "{data.dataset}" has '
            f"{_list_classes(source.names)}."
        )
    _check_same_data(name, settings, data)
    size, crop = input_size(processor), bool(processor.do_center_crop)
    splits = load_splits(
        data, size, processor.resample, split, "validation", names=labels, crop=crop
    )
    dataset, roles = splits[split], source.roles
    started = time.monotonic()
    logits, truth = predict(model, processor, dataset, batch_size, bf16)
    wall = time.monotonic() - started
    metric = ImageClassification(keep_in_memory=True)
    scores = metric.compute(predictions=logits.numpy(), references=truth.numpy())
    detection = None  # of a dataset that has a test split only, nothing is left for the threshold
    if "validation" in splits:
        validation = splits["validation"]
        detection = measure_ood(model, processor, validation, logits, split, data, batch_size, bf16)
    hub_name, revision = runs.split_revision(name)
    is_local = runs.is_local(hub_name)
    return {
        "model": {
            "name": hub_name,
            "revision": None if is_local else runs.hub_commit("model", hub_name, revision),
            "sha256": runs.model_hashes(name),
            "parameters": sum(p.numel() for p in model.parameters()),
            "image_size": size,
        },
        "dataset": {
            "name": data.dataset,
            "config": data.dataset_config or dataset.info.config_name,
            "revision": data.dataset_revision,
            "local": data.dataset != "digits" and runs.is_local(data.dataset),
            "split": split,
            "published_split": roles.get(split, roles.get("train")),
            "is_part": split not in roles,  # split off train
            "images": len(dataset),
            "sha256": content_hash(dataset),
        },
        "labels": labels,
        **scores,
        "predictions": logits.argmax(dim=1).tolist(),
        "confidences": [round(p, 4) for p in logits.softmax(dim=1).amax(dim=1).tolist()],
        "ood": detection,
        "recipe": settings,
        "dtype": "bfloat16" if bf16 else "float32",
        "wall_s": round(wall, 1),
        "hardware": runs.hardware(),
        "versions": runs.versions(),
        "code_revision": runs.code_revision(),
    }


def predict(
    model: PreTrainedModel, processor, dataset: Dataset, batch_size: int = 128, bf16: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classify a decoded dataset, in all processes.

    Returns:
        Logits float32 (N, C) and labels (N,), in the dataset's order.
    """
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    loader = DataLoader(DecodedImages(dataset), batch_size, collate_fn=DecodedImages.collate)
    # Not the model: it is not trained, so each process keeps a copy of its own.
    model, loader = model.to(accelerator.device).eval(), accelerator.prepare(loader)
    logits, labels = [], []
    autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16)
    with torch.inference_mode():
        for batch in tqdm(loader, "Predicting", disable=not accelerator.is_main_process):
            pixels = preprocess(batch["pixel_values"], processor)  # the same in either precision
            with autocast:
                output = model(pixels).logits.float()
            output, truth = accelerator.gather_for_metrics((output, batch["labels"]))
            logits.append(output.cpu())
            labels.append(truth.cpu())
    return torch.cat(logits), torch.cat(labels)


def measure_ood(
    model, processor, validation: Dataset, logits: torch.Tensor, split: str, data: DataArguments,
    batch_size: int = 128, bf16: bool = False,
) -> dict:  # fmt: skip
    """Fit the OOD threshold on validation, and measure how many images pass it.

    Args:
        model: An image classifier.
        processor: Its image processor.
        validation: Decoded.
        logits: float (N, C), of the evaluated split.
        split: Its name.
        data: The dataset; one that is itself among the OOD datasets is left out there.
        batch_size: See `evaluate`.
        bf16: See `evaluate`.

    Returns:
        The `threshold`, the `pass_rate` of validation and of the split, and that of each of the
        `ood_datasets`.
    """

    def predict_logits(dataset: Dataset) -> torch.Tensor:
        return predict(model, processor, dataset, batch_size, bf16)[0]

    validation_logits = predict_logits(validation)
    others = ood.ood_datasets(
        input_size(processor), processor.resample, bool(processor.do_center_crop)
    )
    if data.dataset == "digits":
        del others["handwritten digits"]
    threshold = ood.fit_threshold(validation_logits)
    return {
        "score": "energy",
        "threshold": threshold,
        "target_tpr": ood.TARGET_TPR,
        "pass_rate": {
            "validation": ood.pass_rate(validation_logits, threshold),
            split: ood.pass_rate(logits, threshold),
        },
        "ood_datasets": {
            name: ood.pass_rate(predict_logits(other), threshold) for name, other in others.items()
        },
    }


def save(results: dict, folder: Path) -> None:
    """Save `evaluation_results.json`, and `.txt` to read, in a run's results folder."""
    runs.write_json(folder / "evaluation_results.json", results)
    (folder / "evaluation_results.txt").write_text(as_text(results), "utf-8")
    runs.record_files(
        folder,
        {"evaluation_results.json": None, "evaluation_results.txt": None},
        results["model"]["sha256"]["model.safetensors"],
    )
    runs.link_results(folder, "evaluation_results.txt")


def as_text(results: dict) -> str:
    """Return the results as a report to read."""
    low, high = results["accuracy_interval"]
    model, dataset, rates = results["model"], results["dataset"], results["ood"]
    revision = f" @ {model['revision']}" if model["revision"] else ""
    detection = "not measured: the dataset has no validation images"
    if rates:
        accepted = {dataset["split"]: rates["pass_rate"][dataset["split"]]} | rates["ood_datasets"]
        detection = "images taken for in-distribution (energy score): " + ", ".join(
            f"{name} {rate:.1%}" for name, rate in accepted.items()
        )
    width = max(len(label) for label in results["labels"])
    lines = [
        f"Accuracy       {results['accuracy']:.2%}  (95 % interval {low:.2%} to {high:.2%})",
        f"Balanced       {results['balanced_accuracy']:.2%}, the mean over classes",
        f"Macro-F1       {results['macro_f1']:.4f}",
        f"NLL            {results['nll']:.4f}",
        f"ECE            {results['ece']:.4f}",
        "",
        f"Model          {model['name']}{revision}, {model['image_size']} px, "
        f"{model['parameters'] / 1e6:.1f} M parameters",
        f"Weights        sha256 {model['sha256']['model.safetensors']}",
        f"Dataset        {dataset['name']}, split {dataset['split']}, {dataset['images']:,} images",
        f"OOD detection  {detection}",
        f"Evaluated in   {results['wall_s']} s on {results['hardware']}, {results['dtype']}",
        "",
        f"{'class':{width}}  precision  recall      f1  images",
    ]
    for i, label in enumerate(results["labels"]):
        lines.append(
            f"{label:{width}}  {results['precision'][i]:9.4f}  {results['recall'][i]:6.4f}  "
            f"{results['f1'][i]:6.4f}  {results['support'][i]:6}"
        )
    return "\n".join(lines) + "\n"


def _check_same_data(model: str, settings: dict | None, data: DataArguments) -> None:
    """Raise UserError if a run's own dataset has changed: its splits would be other ones."""
    training = runs.read_json(Path(model).expanduser() / "training.json") or {}
    if settings and settings.get("dataset") == data.dataset and "data" in training:
        own = data_arguments(model)
        if replace(own, dataset_revision=data.dataset_revision) != data:
            return
        if fingerprint(data) != training["data"]:
            raise UserError(
                f'The images of "{data.dataset}" are not the images that {model} was trained on, '
                "so test images may be among those: restore them, or train again."
            )


def _dataset_revision(data: DataArguments) -> str | None:
    if data.dataset == "digits" or runs.is_local(data.dataset):
        return None
    commit = runs.hub_commit("dataset", data.dataset, data.dataset_revision)
    return commit or data.dataset_revision or "main"  # offline: only the Hub has revisions


def _list_classes(labels: list[str]) -> str:
    return f"{len(labels)} classes ({', '.join(labels[:3])}{', …' if len(labels) > 3 else ''})"
