"""The model card: a template and the results. It is a function of published files alone.

See https://huggingface.co/docs/hub/model-cards for the metadata.
"""

import difflib
import re
from itertools import islice
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("card.md")
METRICS = {"accuracy": "Accuracy", "f1": "Macro-F1"}  # by their names on the Hub
SHOWN_LINES, SHOWN_WIDTH = 6, 100  # of the lines where two cards differ


def render(
    results: dict,
    repo: str,
    license: str | None,
    files: list[str],
    faithfulness: dict | None = None,
) -> str:
    """Return the card's text.

    Args:
        results: The content of `evaluation_results.json`.
        repo: The repository, as `owner/name`.
        license: An identifier of the Hub, as `apache-2.0`; None if unknown.
        files: Paths of the published files: the card shows the figures among them.
        faithfulness: The content of `attention_faithfulness.json`.
    """
    dataset, backbone = results["dataset"], (results["recipe"] or {}).get("model")
    dataset_name, base_model = short_name(dataset["name"]), hub_id(backbone)
    # Only a dataset of the Hub has a revision.
    dataset_id = dataset["name"] if dataset["revision"] else None
    metadata = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-classification",
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        datasets=[dataset_id] if dataset_id else None,
        metrics=list(METRICS),
        tags=["vision", "image-classification"],
        model_name=repo.split("/")[1],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset_id or dataset_name,
                dataset_name=dataset_name,
                dataset_config=dataset["config"],
                dataset_split=dataset["split"],
                dataset_revision=dataset["revision"],
                metric_type=metric,
                metric_name=METRICS[metric],
                metric_value=value,
            )
            for metric, value in hub_metrics(results).items()
        ],
    )
    card = ModelCard.from_template(
        metadata,
        template_path=TEMPLATE,
        repo=repo,
        name=repo.split("/")[1],
        results=results,
        backbone=short_name(backbone) if backbone else None,
        base_model=base_model,
        dataset_id=dataset_id,
        dataset_name=dataset_name,
        license=license,
        files=files,
        maps=[file for file in files if file.startswith("visualizations/")],
        faithfulness=faithfulness,
        percent=percent,
    )
    return str(card).rstrip() + "\n"


def hub_metrics(results: dict) -> dict[str, float]:
    """Return the metrics of the card's metadata, by their names on the Hub."""
    return {"accuracy": results["accuracy"], "f1": results["macro_f1"]}


def card_mismatches(
    text: str, results: dict, repo: str, files: list[str], faithfulness: dict | None = None
) -> list[str]:
    """Return the first lines where a card differs from one rendered again, as of a unified diff.

    The license is taken from the card itself. The other arguments are those of `render`.
    """
    try:
        license = ModelCard(text).data.license
    except (ValueError, TypeError, yaml.YAMLError):  # malformed metadata, which differs anyway
        license = None
    expected = render(results, repo, license, files, faithfulness)
    diff = difflib.unified_diff(expected.splitlines(True), text.splitlines(True), n=0)
    lines = (line.rstrip()[:SHOWN_WIDTH] for line in islice(diff, 2, None) if line[0] in "+-")
    return list(islice(lines, SHOWN_LINES))


def percent(ratio: float) -> str:
    return f"{100 * ratio:.2f} %"


def hub_id(name: str | None) -> str | None:
    """Return the name if it has the form of a Hub id, None for a local path or no name."""
    return name if name and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) else None


def short_name(name: str) -> str:
    """Return the last part of a Hub id or of a local path."""
    return name.rstrip("/").split("/")[-1]
