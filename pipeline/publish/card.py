"""The model card: a template and the results. It is a function of published files alone.

See https://huggingface.co/docs/hub/model-cards for the metadata.
"""

import difflib
from itertools import islice
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("card.md")
# By their names on the Hub: the name shown, the key of the results, and the metric's arguments.
METRICS = {
    "accuracy": ("Accuracy", "accuracy", None),
    "f1": ("Macro-F1", "macro_f1", {"average": "macro"}),
}
SHOWN_LINES, SHOWN_WIDTH = 6, 100  # of the lines where two cards differ


def render(results: dict, repo: str, publication: dict, faithfulness: dict | None = None) -> str:
    """Return the card's text.

    Args:
        results: The content of the published `evaluation_results.json`.
        repo: The repository, as `owner/name`.
        publication: The content of `publication.json`: the `files` by path, the `license` with its
            `license_name` and `license_link`, `code_url`, `space`, and the `examples`, which are
            paths of images with their rows in the evaluated split.
        faithfulness: The content of `attention_faithfulness.json`.
    """
    dataset, recipe = results["dataset"], results["recipe"] or {}
    name, backbone, is_hub = repo.split("/")[1], recipe.get("model"), recipe.get("model_revision")
    dataset_id = dataset["name"] if dataset["revision"] else None  # only the Hub has revisions
    base_model = backbone if is_hub else None
    license = {k: v for k, v in publication.items() if k.startswith("license") and v}
    widget = [
        {
            "src": f"https://huggingface.co/{repo}/resolve/main/{path}",
            "example_title": f"Test image {row}",
            "output": [{"label": results["labels"][results["predictions"][row]],
                        "score": results["confidences"][row]}],
        }
        for path, row in publication["examples"].items()
    ]  # fmt: skip
    metadata = ModelCardData(
        **license,
        library_name="transformers",
        pipeline_tag="image-classification",
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        datasets=[dataset_id] if dataset_id else None,
        metrics=list(METRICS),
        tags=["vision", "image-classification"],
        widget=widget or None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset_id or short_name(dataset["name"]),
                dataset_name=short_name(dataset["name"]),
                dataset_config=dataset["config"],
                dataset_split=dataset["published_split"],
                dataset_revision=dataset["revision"],
                metric_type=metric,
                metric_name=metric_name,
                metric_value=results[key],
                metric_args=args,
            )
            for metric, (metric_name, key, args) in METRICS.items()
        ],
    )
    card = ModelCard.from_template(
        metadata,
        template_path=TEMPLATE,
        repo=repo,
        name=name,
        results=results,
        backbone=short_name(backbone) if backbone else None,
        base_model=base_model,
        dataset_id=dataset_id,
        dataset_name=short_name(dataset["name"]),
        publication=publication,
        maps=[path for path in publication["files"] if path.startswith("visualizations/")],
        faithfulness=faithfulness,
        percent=percent,
    )
    return str(card).rstrip() + "\n"


def mismatches(text: str, expected: str) -> list[str]:
    """Return the first lines where a card differs from one rendered again, as of a unified diff."""
    diff = difflib.unified_diff(expected.splitlines(True), text.splitlines(True), n=0)
    lines = (line.rstrip()[:SHOWN_WIDTH] for line in islice(diff, 2, None) if line[0] in "+-")
    return list(islice(lines, SHOWN_LINES))


def percent(ratio: float) -> str:
    return f"{100 * ratio:.2f} %"


def short_name(name: str) -> str:
    """Return the last part of a Hub id or of a local path."""
    return name.rstrip("/").split("/")[-1]
