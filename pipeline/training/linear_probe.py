"""Fit the new head to the pretrained backbone's features before fine-tuning (LP-FT).

Kumar et al. 2022, arXiv:2202.10054. Fine-tuning then starts from a head that knows the classes,
instead of a random one, which would first distort the features.
"""

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.decoding import DecodedImages
from pipeline.data.splits import sample_rows
from pipeline.data.transforms import preprocess
from pipeline.training.backbone import output_layers
from pipeline.training.model import size_options

PENALTY = 0.02  # of the squared weights, for features of unit variance
BATCH = 128  # images


def fit_head(
    model: PreTrainedModel, processor, images: DecodedImages, count: int, size: int
) -> float:
    """Fit a model's last linear layer by logistic regression, in place.

    Args:
        model: A classifier with a pretrained backbone.
        processor: Its image processor.
        images: The training images.
        count: How many of them to use, the same share of each class and at least one.
        size: Image size in pixels.

    Returns:
        The share of these images that the model then classifies correctly.
    """
    (head,) = output_layers(model)  # see `build_model`
    labels, features = [], []
    rows = torch.from_numpy(sample_rows(images.labels, count))
    collector = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    is_training = model.training
    model.eval()
    with torch.no_grad():
        for part in rows.split(BATCH):
            batch = images.batch(part)
            pixels = preprocess(batch["pixel_values"].to(model.device), processor, size)
            model(pixels, **size_options(model, size))
            labels.append(batch["labels"].to(model.device))
    collector.remove()
    model.train(is_training)
    features, labels = torch.cat(features).float(), torch.cat(labels)
    fitted = _logistic_regression(features, labels, model.config.num_labels)
    weight, bias = broadcast(list(fitted))  # the first process's, since they may round differently
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.copy_(bias)
        return (head(features).argmax(dim=1) == labels).float().mean().item()


def _logistic_regression(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return weights (C, D) and biases (C,) for features (N, D) and labels (N,).

    By L-BFGS on the device. scikit-learn's takes six times as long, and leaves out classes that do
    not occur.
    """
    scale = features.std(dim=0).clamp(min=1e-6)
    inputs = features / scale
    weight = torch.zeros(classes, inputs.shape[1], device=inputs.device, requires_grad=True)
    bias = torch.zeros(classes, device=inputs.device, requires_grad=True)
    options = {"max_iter": 100, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([weight, bias], **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels)
        loss = loss + PENALTY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach() / scale, bias.detach()
