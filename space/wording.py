"""The page's text, made from the model, its evaluation results and a prediction."""

import os
from pathlib import Path

from huggingface_hub import constants
from jinja2 import Template

import inference
from inference import Classifier, Prediction

STATUS = '<p role="status">{}</p>'  # announced by screen readers
DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
OOD = "Probably none of its classes: the picture looks unlike the training images."
METHODS = {  # the name of each method, and an explanation of its map
    "mean": ("Layer mean", "Layer {layer}: attention of [CLS] to each patch, mean over all heads."),
    "head": ("Single head", "Layer {layer}, head {head}: attention of [CLS] to each patch."),
    "rollout": ("Rollout", "Attention rollout: the attention of all layers combined."),
    "relevance": ("Class relevance", "Class relevance: the patches that support “{label}”."),
}
CONTROL_METHODS = (("mean", "head"), ("head",), ("relevance",))  # that use layer, head and class


def render(template: str, classifier: Classifier) -> str:
    """Fill in `header.md` or `footer.md` for a model."""
    values = {"model": classifier, "hub": constants.ENDPOINT, "space": os.environ.get("SPACE_ID")}
    text = Path(__file__).with_name(template).read_text("utf-8")
    return Template(text).render(**values, limits=inference, percent=percent)


def answer(classifier: Classifier, prediction: Prediction) -> str:
    """Return the predicted class and its confidence, or that the picture is out of distribution."""
    label, p = next(iter(prediction.probs.items()))
    confidence = percent(p) if p < 0.999 else "more than " + percent(0.999)
    if classifier.is_ood(prediction):
        return f"{OOD} The closest class is {label} ({confidence})."
    return f"{label}, {confidence} confident"


def percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
