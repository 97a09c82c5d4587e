"""Temperature scaling: one number, fitted on validation, that makes confidences match accuracy.

Guo et al. 2017, arXiv:1706.04599. The logits are divided by it, so the top class stays. Folded into
the last linear layer, it needs no code where the model is used.
"""

import os
import shutil

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline import runs
from pipeline.data.loading import load_split
from pipeline.errors import UserError
from pipeline.evaluation.outputs import predict
from pipeline.recipe import Recipe
from pipeline.training.backbone import head_names
from pipeline.training.model import load_model


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature of the lowest cross-entropy, of logits (N, C) and labels (N,)."""
    logits = logits.double()

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(logits * 2**-log_temperature, labels).item()

    return float(2 ** minimize_scalar(loss, bounds=(-5, 5), method="bounded").x)


def fold_temperature(model: PreTrainedModel, temperature: float) -> None:
    """Divide a model's logits by the temperature, in place: weight and bias of the last layers."""
    heads = head_names(model)
    layers = [
        layer
        for name, layer in model.named_modules()  # two, which are averaged, in SwiftFormer
        if isinstance(layer, nn.Linear)
        and f"{name}.weight" in heads
        and layer.out_features == model.config.num_labels
    ]
    if not layers:
        raise UserError(f"{type(model).__name__} has no last linear layer: leave out calibrate.")
    with torch.no_grad():
        for parameter in (p for layer in layers for p in layer.parameters()):
            parameter.div_(temperature)


def calibrate_run(recipe: Recipe) -> float:
    """Fold a trained run's temperature into its model, in `models/<run>`, unless it is done.

    Returns:
        The temperature, which `training.json` keeps.
    """
    folder, main = recipe.model_folder, recipe.training.process_index == 0
    summary = runs.read_json(folder / "training.json")
    if "temperature" in summary:
        return summary["temperature"]
    model, processor = load_model(str(folder))
    validation = load_split(recipe.data, "validation", processor)
    temperature = fit_temperature(*predict(model, processor, validation))
    if main:
        # If this ends between the two files, the next fit gives 1: nothing is folded twice.
        fold_temperature(model, temperature)
        part = folder.with_name(f"{recipe.run}.part")
        model.cpu().save_pretrained(part)
        os.replace(part / "model.safetensors", folder / "model.safetensors")
        shutil.rmtree(part)
        runs.write_json(folder / "training.json", summary | {"temperature": temperature})
    return temperature
