"""Temperature scaling: one number, fit on validation, makes confidences match accuracy.

Guo et al. 2017, arXiv:1706.04599. Dividing the logits by it does not change the top class. Since it
is folded into the last linear layer, users of the model need no extra code.
"""

import os
import shutil

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.loading import load_split
from pipeline.errors import UserError
from pipeline.evaluation.outputs import predict
from pipeline.recipe import Recipe
from pipeline.runs import print_once
from pipeline.training.backbone import output_layers
from pipeline.training.model import load_model


def fit_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """Return the temperature that minimizes cross-entropy for logits (N, C) and labels (N,).

    None if all are classified correctly, where the lowest temperature would seem the best.
    """
    if (logits.argmax(dim=1) == labels).all():
        return None
    logits = logits.double()

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(logits * 2**-log_temperature, labels).item()

    return float(2 ** minimize_scalar(loss, bounds=(-5, 5), method="bounded").x)


def fold_temperature(model: PreTrainedModel, temperature: float) -> None:
    """Divide a model's logits by the temperature, by scaling its last linear layers in place."""
    layers = output_layers(model)
    if not layers:
        raise UserError(f"{type(model).__name__} has no last linear layer: remove calibrate.")
    with torch.no_grad():
        for parameter in (p for layer in layers for p in layer.parameters()):
            parameter.div_(temperature)


def calibrate_run(recipe: Recipe) -> float:
    """Fold a run's temperature into its model, unless already done; return the temperature.

    `config.json` stores it as `calibration_temperature`.
    """
    folder = recipe.model_folder
    model, processor = load_model(str(folder))
    if hasattr(model.config, "calibration_temperature"):
        return model.config.calibration_temperature
    validation = load_split(recipe.data, "validation", processor)
    temperature = fit_temperature(*predict(model, processor, validation))
    if temperature is None:
        print_once(
            f"Not calibrated: all {len(validation)} validation images are classified correctly, so "
            "no temperature can be fit. Raise validation_size."
        )
        temperature = 1.0
    if recipe.training.process_index == 0:
        fold_temperature(model.cpu(), temperature)
        model.config.calibration_temperature = temperature
        part = folder.with_name(f"{recipe.run}.part")
        model.save_pretrained(part)
        # The weights first: if this is interrupted between the two, the next fit gives about 1.
        for name in ("model.safetensors", "config.json"):
            os.replace(part / name, folder / name)
        shutil.rmtree(part)
    return temperature
