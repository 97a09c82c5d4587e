"""Score a model on a split, and write down what came of it and from what.

The results carry the hashes of the weights and of the image processor, so that whatever is
made of them later (card, push, Space) can refuse another model's.
"""

import hashlib
import json
import os
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from huggingface_hub import hf_hub_download
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from pipeline import environment, familiarity
from pipeline.data import Batches, content_hash, load_splits
from pipeline.errors import UserError
from pipeline.metrics import ImageClassification
from pipeline.model import load
from pipeline.preprocess import preprocess
from pipeline.recipe import DataArguments
from pipeline.revision import hub_commit, is_local

FILES = ("model.safetensors", "config.json", "preprocessor_config.json")


def evaluate(
    name: str,
    data: DataArguments,
    split: str = "test",
    batch_size: int = 128,
    bf16: bool = False,
) -> dict:
    """Score a model, a folder or `id@revision` on the Hub, on one split, in float32.

    `bf16` scores it in bfloat16 where that is fast: for a quick look, not to be published.
    Returns the results as plain values for JSON: the metrics of `ImageClassification`, and
    what they were computed from. `predictions` and `confidences` hold each image's, in
    order, `familiarity` what `measure_familiarity` found, and `recipe` the settings the model
    was trained by, its seed among them, where they are known. UserError for a model or dataset
    that can't be had, or whose classes differ.
    """
    if bf16 and not environment.fast_bfloat16():
        bf16 = False
        print("This processor is not made for bfloat16: scoring in float32.")
    recipe = recipe_of(name)
    name, revision = split_revision(name)
    model, processor = load(name, revision)
    size = processor.size["height"]
    dataset = load_splits(data, size, processor.resample, only=split)[split]
    labels = dataset.features["label"].names
    known = [model.config.id2label[i] for i in range(model.config.num_labels)]
    if known != labels:
        raise UserError(
            f'"{name}" tells apart {_some(known)}; the dataset "{data.dataset}" '
            f"has {_some(labels)}."
        )
    started = time.monotonic()
    logits, truth = predict(model, processor, dataset, batch_size, split, bf16)
    wall = time.monotonic() - started
    familiar = measure_familiarity(model, processor, data, logits, split, batch_size, bf16)
    metric = ImageClassification(keep_in_memory=True)
    scores = metric.compute(predictions=logits.numpy(), references=truth.numpy())
    return {
        "model": {
            "name": name,
            "revision": revision if is_local(name) else hub_commit("model", name, revision),
            "sha256": hashes(name, revision),
            "parameters": sum(p.numel() for p in model.parameters()),
            "image_size": size,
        },
        "dataset": {
            "name": data.dataset,
            "config": data.dataset_config or dataset.info.config_name,
            "revision": dataset_revision(data),
            "split": split,
            "images": len(dataset),
            "sha256": content_hash(dataset),
        },
        "labels": labels,
        **scores,
        "predictions": logits.argmax(dim=1).tolist(),
        "confidences": [round(p, 4) for p in logits.softmax(dim=1).amax(dim=1).tolist()],
        "familiarity": familiar,
        "recipe": recipe,
        "dtype": "bfloat16" if bf16 else "float32",
        "wall_s": round(wall, 1),
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        "code_revision": environment.code_revision(),
    }


def predict(
    model,
    processor,
    dataset,
    batch_size: int = 128,
    what: str = "images",
    bf16: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 (N, C) and labels (N,), in the dataset's order, from all processes."""
    accelerator = Accelerator()
    loader = DataLoader(Batches(dataset), batch_size, collate_fn=Batches.collate)
    # Not the model: it is not trained, so each process keeps a copy of its own.
    model, loader = model.to(accelerator.device).eval(), accelerator.prepare(loader)
    logits, labels = [], []
    rounded = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16)
    with torch.inference_mode():
        for batch in tqdm(loader, f"Scoring {what}", disable=not accelerator.is_main_process):
            pixels = preprocess(batch["pixel_values"], processor)  # the same in either precision
            with rounded:
                output = model(pixels).logits.float()
            output, truth = accelerator.gather_for_metrics((output, batch["labels"]))
            logits.append(output.cpu())
            labels.append(truth.cpu())
    return torch.cat(logits), torch.cat(labels)


def measure_familiarity(
    model, processor, data: DataArguments, logits: torch.Tensor, split: str, batch_size: int,
    bf16: bool = False,
) -> dict:  # fmt: skip
    """The threshold fitted on validation, and the share of images that reach it: of validation,
    of the split with these logits (N, C), and of pictures of other things. See `familiarity`.
    """
    size, resample = processor.size["height"], processor.resample

    def scored(dataset, what: str) -> torch.Tensor:
        return predict(model, processor, dataset, batch_size, what, bf16)[0]

    splits = load_splits(data, size, resample, only="validation")
    validation = scored(splits["validation"], "validation")
    others = familiarity.other_pictures(size, resample)
    if data.dataset == "digits":
        del others["handwritten digits"]
    threshold = familiarity.fit(validation)
    return {
        "score": "energy",
        "threshold": threshold,
        "validation": familiarity.share(validation, threshold),
        split: familiarity.share(logits, threshold),
        "others": {n: familiarity.share(scored(d, n), threshold) for n, d in others.items()},
    }


def write(results: dict, folder: Path) -> None:
    """`evaluation_results.json` for programs and `evaluation_results.txt` for people."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation_results.json").write_text(json.dumps(results, indent=1))
    (folder / "evaluation_results.txt").write_text(as_text(results))


def as_text(results: dict) -> str:
    low, high = results["accuracy_interval"]
    model, dataset = results["model"], results["dataset"]
    familiar = results["familiarity"]
    width = max(len(label) for label in results["labels"])
    lines = [
        f"Accuracy       {results['accuracy']:.2%}  (95 % interval {low:.2%} to {high:.2%})",
        f"Macro-F1       {results['macro_f1']:.4f}",
        f"NLL            {results['nll']:.4f}",
        f"ECE            {results['ece']:.4f}",
        "",
        f"Model          {model['name']}"
        + (f" @ {model['revision']}" if model["revision"] else "")
        + f", {model['image_size']} px, {model['parameters'] / 1e6:.1f} M parameters",
        f"Weights        sha256 {model['sha256']['model.safetensors']}",
        f"Dataset        {dataset['name']}, split {dataset['split']}, {dataset['images']:,} images",
        f"Familiar       {familiar[dataset['split']]:.1%} of these images pass as like those it "
        "was trained on; of " + ", of ".join(f"{n} {s:.1%}" for n, s in familiar["others"].items()),
        f"Scored in      {results['wall_s']} s on {results['hardware']}, {results['dtype']}",
        "",
        f"{'class':{width}}  precision  recall      f1  images",
    ]
    for i, label in enumerate(results["labels"]):
        lines.append(
            f"{label:{width}}  {results['precision'][i]:9.4f}  {results['recall'][i]:6.4f}  "
            f"{results['f1'][i]:6.4f}  {results['support'][i]:6}"
        )
    return "\n".join(lines) + "\n"


def split_revision(name: str) -> tuple[str, str | None]:
    """`id@revision` as its two parts."""
    name, _, revision = name.partition("@")
    return name, revision or None


def hashes(name: str, revision: str | None = None) -> dict[str, str]:
    """SHA-256 of each file that makes up a model."""
    local = is_local(name)
    folder = Path(os.path.expanduser(name))
    digests = {}
    for file in FILES:
        path = folder / file if local else hf_hub_download(name, file, revision=revision)
        with open(path, "rb") as opened:
            digests[file] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digests


def recipe_of(name: str) -> dict | None:
    """The settings that a model was trained by, from the recipe.yaml beside it, if any."""
    name, revision = split_revision(name)
    if is_local(name):
        path = Path(os.path.expanduser(name)) / "recipe.yaml"
    else:
        hub_commit("model", name, revision)
        try:
            path = Path(hf_hub_download(name, "recipe.yaml", revision=revision))
        except OSError:
            return None
    return yaml.safe_load(path.read_text()) if path.is_file() else None


def data_of(name: str, dataset: str | None = None) -> DataArguments:
    """The data that a model was trained on, by its recipe, or `dataset` in its place.

    UserError where neither is known.
    """
    settings = recipe_of(name)
    if settings is None and dataset is None:
        raise UserError(f'"{name}" has no recipe.yaml: say which data to use with DATASET=.')
    names = [field.name for field in fields(DataArguments)]
    data = DataArguments(**{key: settings[key] for key in names if key in (settings or {})})
    if dataset is None:
        return data
    return replace(data, dataset=dataset, dataset_config=None, dataset_revision=None)


def last_run() -> str:
    """The folder of the model that was trained last; UserError where there is none."""
    runs = sorted(Path("models").glob("*/training.json"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UserError("There is no trained model in models/: train one, or name one with MODEL=.")
    return str(runs[-1].parent)


def dataset_revision(data: DataArguments) -> str | None:
    if data.dataset == "digits" or is_local(data.dataset):
        return None
    return hub_commit("dataset", data.dataset, data.dataset_revision)


def _some(labels: list[str]) -> str:
    shown = ", ".join(labels[:3])
    return f"{len(labels)} classes ({shown}{', …' if len(labels) > 3 else ''})"
