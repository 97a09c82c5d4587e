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
    """Fold a run's temperature into its model, unless that is done; return it.

    `config.json` keeps it as `calibration_temperature`.
    """
    folder = recipe.model_folder
    model, processor = load_model(str(folder))
    if hasattr(model.config, "calibration_temperature"):
        return model.config.calibration_temperature
    validation = load_split(recipe.data, "validation", processor)
    temperature = fit_temperature(*predict(model, processor, validation))
    if recipe.training.process_index == 0:
        fold_temperature(model.cpu(), temperature)
        model.config.calibration_temperature = temperature
        part = folder.with_name(f"{recipe.run}.part")
        model.save_pretrained(part)
        # The weights first: if this ends between the two, the next fit gives about 1.
        for name in ("model.safetensors", "config.json"):
            os.replace(part / name, folder / name)
        shutil.rmtree(part)
    return temperature
