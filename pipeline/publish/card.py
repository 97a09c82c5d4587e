"""The model card: a template, and the numbers of the results; and the numbers read back.

See https://huggingface.co/docs/hub/model-cards for the metadata.
"""

import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("card.md")
METRICS = {"accuracy": "Accuracy", "f1": "Macro-F1"}  # by their names on the Hub


def render(
    results: dict,
    repo: str,
    licence: str | None,
    files: list[str],
    faithfulness: dict | None = None,
) -> str:
    """The card's text. `results` are those of `evaluation_results.json`, `faithfulness` those
    of `attention_faithfulness.json`, `files` the paths of what is published with it (a picture
    is shown where it is there).
    """
    recipe = results.get("recipe") or {}
    dataset, training = results["dataset"], results.get("training") or {}
    base = hub_id(recipe.get("model"))
    metadata = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="image-classification",
        base_model=base,
        datasets=[dataset["name"]] if hub_id(dataset["name"]) else None,
        metrics=list(METRICS),
        tags=["vision", "image-classification"],
        model_name=repo.split("/")[1],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=hub_id(dataset["name"]) or short_name(dataset["name"]),
                dataset_name=short_name(dataset["name"]),
                dataset_config=dataset["config"],
                dataset_split=dataset["split"],
                dataset_revision=dataset["revision"],
                metric_type=metric,
                metric_name=METRICS[metric],
                metric_value=value,
            )
            for metric, value in measured(results).items()
        ],
    )
    card = ModelCard.from_template(
        metadata,
        template_path=TEMPLATE,
        repo=repo,
        name=repo.split("/")[1],
        licence=licence,
        base=base,
        backbone=short_name(recipe["model"]) if recipe.get("model") else None,
        dataset_name=short_name(dataset["name"]),
        dataset_id=hub_id(dataset["name"]),
        headline=headline(results),
        rows=rows(results),
        classes=class_rows(results),
        pictures=[file for file in files if file.endswith(".png")],
        # The overview and two series over the layers: the others are among the files.
        maps=[file for file in files if file.startswith("visualizations/")][:3],
        faithfulness=faithfulness,
        map_rows=map_rows(faithfulness),
        familiar_rows=familiar_rows(results),
        recipe=yaml.safe_dump(recipe, sort_keys=False).strip() if recipe else None,
        seed=recipe.get("seed"),
        training=training,
        **{key: results[key] for key in ("model", "dataset", "labels", "versions", "hardware")},
        code_revision=results["code_revision"],
    )
    return str(card)


def measured(results: dict) -> dict[str, float]:
    """The metrics of the metadata, by their names on the Hub."""
    return {"accuracy": results["accuracy"], "f1": results["macro_f1"]}


def headline(results: dict) -> str:
    low, high = results["accuracy_interval"]
    return (
        f"**{percent(results['accuracy'])}** of {results['dataset']['images']:,} images right "
        f"(95 % interval {percent(low)} to {percent(high)})"
    )


def rows(results: dict) -> dict[str, tuple[str, ...]]:
    """The rows of the table of metrics, by name."""
    low, high = results["accuracy_interval"]
    return {
        "Accuracy": (percent(results["accuracy"]), f"{percent(low)} to {percent(high)}"),
        "Macro-F1": (f"{results['macro_f1']:.4f}", ""),
        "Negative log-likelihood": (f"{results['nll']:.4f}", ""),
        "Expected calibration error": (f"{results['ece']:.4f}", ""),
    }


def class_rows(results: dict) -> dict[str, tuple[str, ...]]:
    """The rows of the table of classes, by label."""
    columns = (results[key] for key in ("precision", "recall", "f1", "support"))
    return {
        label.replace("|", "/"): (f"{p:.4f}", f"{r:.4f}", f"{f:.4f}", str(n))
        for label, p, r, f, n in zip(results["labels"], *columns, strict=True)
    }


def familiar_rows(results: dict) -> dict[str, tuple[str, ...]]:
    """The rows of the table of how many pictures pass as familiar, by what they are."""
    familiarity, split = results["familiarity"], results["dataset"]["split"]
    shares = {
        f"validation images, threshold {familiarity['threshold']:.3f}": familiarity["validation"],
        f"{split} images": familiarity[split],
        **familiarity["others"],
    }
    return {kind: (percent(share),) for kind, share in shares.items()}


def map_rows(faithfulness: dict | None) -> dict[str, tuple[str, ...]]:
    """The rows of the table of attention methods, by name: area and gain over random order."""
    found = {}
    for method, kinds in (faithfulness or {"methods": {}})["methods"].items():
        cells = []
        for kind in ("deletion", "insertion"):
            entry = kinds[kind]
            cells.append(f"{entry['area']:.3f}")
            if "better_by" in entry:
                low, high = entry["better_by_interval"]
                verdict = "better" if entry["beats_random"] else "**not better**"
                cells.append(f"{verdict}, {entry['better_by']:+.3f} ({low:+.3f} to {high:+.3f})")
            else:
                cells.append("")
        found[f"{method} order" if method == "random" else f"`{method}`"] = tuple(cells)
    return found


def differences(text: str, results: dict, faithfulness: dict | None = None) -> list[str]:
    """Where a card, read as it stands, says something other than the results; [] if nowhere."""
    found = []

    def expect(what: str, said, true) -> None:
        if said != true:
            found.append(f"the card gives {what} as {said}, measured was {true}")

    index = {r.metric_type: r.metric_value for r in ModelCard(text).data.eval_results or []}
    for metric, value in measured(results).items():
        expect(f"{METRICS[metric]} (metadata)", index.get(metric), value)
    tables = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in text.splitlines()
        if line.startswith("|")
    ]
    true = rows(results) | class_rows(results) | familiar_rows(results) | map_rows(faithfulness)
    for name, cells in true.items():
        if (name, *cells) not in tables:
            said = [row[1:] for row in tables if row[0] == name]
            expect(f'"{name}"', said, list(cells))
    expect("the headline", re.findall(r"\*\*[\d.]+ %\*\* of .*?\)", text), [headline(results)])
    return found


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def hub_id(name: str | None) -> str | None:
    """The name if it can be a Hub id; None for a local folder, or for none at all."""
    return name if name and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) else None


def short_name(name: str) -> str:
    """The last part: what a local folder is called, without where it lies."""
    return name.rstrip("/").split("/")[-1]
