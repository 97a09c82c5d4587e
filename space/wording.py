"""The sentences of the page, made from the model, its evaluation results and a prediction."""

from html import escape
from pathlib import Path

from huggingface_hub import constants

from inference import FORMATS, MAX_BYTES, MAX_PIXELS, Classifier, Prediction

DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
OOD = "Probably none of its classes: the picture looks unlike the training images."
METHODS = [
    ("Layer mean", "mean"),
    ("Single head", "head"),
    ("Rollout", "rollout"),
    ("Class relevance", "relevance"),
]
CONTROL_METHODS = (("mean", "head"), ("head",), ("relevance",))  # for layer, head and class
CAPTIONS = {
    "mean": "Layer {layer}: attention of the [CLS] token to each patch, mean of all heads.",
    "head": "Layer {layer}, head {head}: attention of the [CLS] token to each patch.",
    "rollout": "Attention rollout: the attention of all layers combined.",
    "relevance": "Class relevance: the patches that speak for “{label}”.",
}
HELP = """Upload a picture or choose an example. The model names the class and shows which parts of
the picture it attends to ([Vision Transformer](https://arxiv.org/abs/2010.11929),
[attention rollout](https://arxiv.org/abs/2005.00928),
[class relevance](https://arxiv.org/abs/2103.15679))."""
FILES = (
    f"**Pictures:** {', '.join(FORMATS)} files of at most {MAX_BYTES // 2**20} MB and "
    f"{MAX_PIXELS // 10**6} megapixels. They are deleted within two hours."
)


def page_title(classifier: Classifier | None) -> str:
    results = classifier.results if classifier else None
    dataset = Path(results["dataset"]["name"]).name if results else "image"
    return f"{DATASETS.get(dataset, dataset.capitalize())} classifier with attention maps"


def answer(classifier: Classifier, prediction: Prediction) -> str:
    """Return the predicted class and its confidence, or that the picture is out of distribution."""
    label, p = next(iter(prediction.probs.items()))
    confidence = percent(p) if p < 0.999 else "more than " + percent(0.999)
    if classifier.is_in_distribution(prediction):
        return f"{label}, {confidence} confident"
    return f"{OOD} The closest class is {label} ({confidence})."


def caption(prediction: Prediction, method: str, layer: int, head: int, label: str) -> str:
    """Return what a map shows; `label` is that of relevance, by default the predicted class."""
    label = label or next(iter(prediction.probs))
    return CAPTIONS[method].format(layer=layer, head=head, label=label)


def link(classifier: Classifier) -> str:
    """Return a link to the model at its revision, in Markdown."""
    name, revision = classifier.name, classifier.revision
    if revision is None:
        return f"Model: `{name}`"
    url = f"{constants.ENDPOINT}/{name}/tree/{revision}"
    return f"Model: [{name}]({url}) at revision `{revision[:7]}`"


def about(classifier: Classifier) -> str:
    """Return what was measured of the model, in Markdown."""
    labels, results = classifier.labels, classifier.results
    more = f" and {len(labels) - 20:,} more" if len(labels) > 20 else ""
    lines = [f"**Classes:** {', '.join(labels[:20])}{more}."]
    if results is None:
        return "\n\n".join([*lines, "**Accuracy** was not published with this model.", FILES])
    low, high = map(percent, results["accuracy_interval"])
    images = f"{results['dataset']['images']:,} {results['dataset']['split']} images"
    lines.append(
        f"**Accuracy {percent(results['accuracy'])}** on {images} (95 % interval {low} to {high})."
    )
    if ood := results.get("ood"):
        rates = [f"{percent(rate)} of {name}" for name, rate in ood["ood_datasets"].items()]
        lines.append(
            "**Out-of-distribution detection** accepts "
            f"{percent(ood['pass_rate'][results['dataset']['split']])} of the test images; of "
            f"pictures of other things it wrongly accepts {' and '.join(rates)}."
        )
    return "\n\n".join([*lines, FILES])


def status(sentence: str) -> str:
    """Return HTML that screen readers announce."""
    return f'<p role="status">{escape(sentence)}</p>'


def percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
