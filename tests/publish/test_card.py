"""The card: what it says is what the results hold."""

import json
import re

import pytest
import yaml
from conftest import FAITHFULNESS
from huggingface_hub import ModelCard

from pipeline import card


@pytest.fixture
def results(measured) -> dict:
    results = json.loads((measured / "results/evaluation_results.json").read_text())
    results["dataset"] |= {"name": "uoft-cs/cifar10", "config": "plain_text", "revision": "ab" * 20}
    results["recipe"]["model"] = "facebook/dinov2-small"
    return results


def render(results: dict, files=("recipe.yaml", "confusion_matrix.png")) -> str:
    return card.render(results, "me/model", "apache-2.0", list(files))


def test_the_metadata_names_where_it_comes_from_and_what_it_scored(results):
    data = ModelCard(render(results)).data
    assert data.license == "apache-2.0"
    assert data.base_model == "facebook/dinov2-small"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "image-classification"
    assert data.datasets == ["uoft-cs/cifar10"]
    assert data.metrics == ["accuracy", "f1"]
    accuracy = next(r for r in data.eval_results if r.metric_type == "accuracy")
    assert accuracy.metric_value == results["accuracy"]
    assert (accuracy.dataset_type, accuracy.dataset_config) == ("uoft-cs/cifar10", "plain_text")
    assert (accuracy.dataset_split, accuracy.dataset_revision) == ("test", "ab" * 20)


def test_a_run_without_validation_claims_none(results):
    results["training"] = {
        "epochs": 1.0, "training_images": 900, "wall_s": 60, "hardware": "2 cores",
        "precision": "no", "validation_accuracy": 0.5, "validation_images": 100, "best_step": 7,
    }  # fmt: skip
    assert "\n| Validation accuracy | 50.00 % of 100 images" in render(results)
    results["training"] |= {"validation_accuracy": None, "best_step": None}
    card = render(results)
    assert "Validation accuracy" not in card
    assert "float32 |\n| " in card  # the table goes on


def test_the_numbers_are_those_of_the_results(results):
    text = render(results)
    assert card.differences(text, results) == []
    assert f"| Accuracy | {100 * results['accuracy']:.2f} % |" in text
    assert f"| 7 | {results['precision'][7]:.4f} | {results['recall'][7]:.4f} |" in text


@pytest.mark.parametrize(
    ("pattern", "wrong"),
    [
        (r"value: 0\.\d+", "value: 0.99"),
        (r"\| Accuracy \| [\d.]+", "| Accuracy | 99.00"),
        (r"\| Macro-F1 \| [\d.]+", "| Macro-F1 | 0.9900"),
        (r"\| 7 \| [\d.]+", "| 7 | 0.9900"),
        (r"\*\*[\d.]+ %\*\*", "**99.00 %**"),
        (r"interval [\d.]+ %", "interval 99.00 %"),
        (r"\| 3 \|.*\n", ""),
        (r"photographs \| [\d.]+", "photographs | 99.00"),
        (r"threshold -?[\d.]+", "threshold 99.000"),
    ],
)
def test_any_wrong_number_is_found(results, pattern, wrong):
    text = re.sub(pattern, wrong, render(results), count=1)
    assert len(card.differences(text, results)) == 1


def test_local_folders_are_named_without_where_they_lie(results):
    results["dataset"] |= {"name": "/home/somebody/photos", "config": None, "revision": None}
    results["recipe"] = {"model": "../shared/models/dinov2-small"}
    card_text = card.render(results, "me/model", None, ["confusion_matrix.png"])
    data = ModelCard(card_text).data
    assert data.base_model is None
    assert data.datasets is None
    assert data.license is None
    assert "/home/somebody" not in card_text
    assert "`dinov2-small`, fine-tuned on `photos`" in card_text


def test_how_faithful_maps_are_is_said_also_where_they_are_not(results):
    found = {"images": 200, "methods": FAITHFULNESS}
    text = card.render(
        results, "me/model", None, ["visualizations/overview.png"], faithfulness=found
    )
    row = "| `mean` | 0.400 | better, +0.100 (+0.050 to +0.150) "
    row += "| 0.480 | **not better**, -0.020 (-0.070 to +0.030) |"
    assert row in text
    assert card.differences(text, results, found) == []
    wrong = text.replace("0.480 |", "0.580 |")
    assert len(card.differences(wrong, results, found)) == 1


def test_pictures_and_the_recipe_are_shown_where_they_are(results):
    text = render(results, ["visualizations/a b_layers.png"])
    assert "![Attention in every layer](<visualizations/a b_layers.png>)" in text
    assert "Whether to believe" not in text
    assert "confusion_matrix.png" not in text
    shown = re.search("```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(shown[1]) == results["recipe"]
    for part in ("None", "{{", "{%"):
        assert part not in text
