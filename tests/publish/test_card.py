"""The card says what the results say, and depends on published files alone."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from pipeline.publish import card

REPO = "me/model"


@pytest.fixture
def results(measured) -> dict:
    results = json.loads((measured / "results/tiny/evaluation_results.json").read_text())
    results["dataset"] |= {"name": "uoft-cs/cifar10", "config": "plain_text", "revision": "ab" * 20}
    results["recipe"]["model"] = "facebook/dinov2-small"
    return results


@pytest.fixture
def faithfulness() -> dict:
    def curve(auc: float, gain: float) -> dict:
        interval = [gain - 0.05, gain + 0.05]
        gains = {"gain_over_random": gain, "gain_interval": interval, "beats_random": gain > 0.05}
        return {"auc": auc, "interval": [auc - 0.1, auc + 0.1], **gains}

    random = {"auc": 0.5, "interval": [0.4, 0.6]}
    methods = {
        "random": {"deletion": random, "insertion": random},
        "mean": {"deletion": curve(0.4, 0.1), "insertion": curve(0.48, -0.02)},
    }
    return {"images": 200, "methods": methods}


def render(results: dict, files=("recipe.yaml", "confusion_matrix.png")) -> str:
    return card.render(results, REPO, "apache-2.0", list(files))


def test_the_metadata_names_backbone_dataset_and_metrics(results):
    data = ModelCard(render(results)).data
    assert data.license == "apache-2.0"
    assert (data.base_model, data.base_model_relation) == ("facebook/dinov2-small", "finetune")
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "image-classification"
    assert data.datasets == ["uoft-cs/cifar10"]
    assert data.metrics == ["accuracy", "f1"]
    accuracy = next(r for r in data.eval_results if r.metric_type == "accuracy")
    assert accuracy.metric_value == results["accuracy"]
    assert (accuracy.dataset_type, accuracy.dataset_config) == ("uoft-cs/cifar10", "plain_text")
    assert (accuracy.dataset_split, accuracy.dataset_revision) == ("test", "ab" * 20)


def test_the_tables_have_the_numbers_of_the_results(results):
    text = render(results)
    assert f"| Accuracy | {100 * results['accuracy']:.2f} % |" in text
    assert f"| 7 | {results['precision'][7]:.4f} | {results['recall'][7]:.4f} |" in text
    ood = results["ood"]
    assert f"at least {ood['threshold']:.3f}. With this threshold 95 %" in text
    assert f"| test split | {100 * ood['pass_rate']['test']:.2f} % |" in text
    assert f"| OOD: photographs | {100 * ood['ood_datasets']['photographs']:.2f} % |" in text
    for rest_of_the_template in ("None", "{{", "{%", "\n\n\n"):
        assert rest_of_the_template not in text


def test_many_classes_are_folded_and_not_listed(results):
    assert "<details>" not in render(results)
    results["labels"] = [f"class {i} | {i}" for i in range(21)]
    for key in ("precision", "recall", "f1", "support"):
        results[key] = [1] * 21
    text = render(results)
    assert "21 classes. It is" in text
    assert re.search(
        r"</summary>\n\n\| Class .*\| class 20 \\\| 20 \|[^\n]*\n\n</details>", text, re.S
    )


def test_a_run_without_validation_shows_no_validation_accuracy(results):
    results["training"] = {
        "epochs": 1.0, "training_images": 900, "wall_s": 60, "hardware": "2 cores",
        "precision": "no", "validation_accuracy": 0.5, "validation_images": 100, "best_step": 7,
    }  # fmt: skip
    checkpoint = "| Checkpoint | step 7, chosen by validation accuracy: 50.00 % of 100 images |"
    assert checkpoint in render(results)
    results["training"] |= {"validation_accuracy": None, "best_step": None}
    text = render(results)
    assert "Checkpoint" not in text
    assert "float32 |\n| " in text  # the table goes on


def test_the_evaluated_split_is_named_as_it_is(results):
    assert "used neither for training nor for choosing the checkpoint" in render(results)
    results["dataset"]["split"] = "validation"
    text = render(results)
    assert "accuracy on the validation split" in text
    assert "used neither" not in text


def test_local_folders_are_named_without_their_path(results):
    results["dataset"] |= {"name": "data/photos", "config": None, "revision": None}
    results["recipe"] = {"model": "../shared/models/dinov2-small"}
    text = card.render(results, REPO, None, ["confusion_matrix.png"])
    data = ModelCard(text).data
    assert (data.base_model, data.datasets, data.license) == (None, None, None)
    assert "data/photos" not in text
    assert "../shared" not in text
    assert "It is\n`dinov2-small`, fine-tuned on `photos`." in text
    assert "The license is that of `dinov2-small`" in text


def test_attention_methods_are_compared_with_a_random_order(results, faithfulness):
    files = ["visualizations/overview.png"]
    text = card.render(results, REPO, None, files, faithfulness)
    row = "| mean | 0.400 | +0.100 (+0.050 to +0.150) "
    row += "| 0.480 | -0.020 (-0.070 to +0.030), not better than random |"
    assert row in text
    assert "| random | 0.500 | | 0.500 | |" in text
    assert card.card_mismatches(text, results, REPO, files, faithfulness) == []
    wrong = text.replace("0.480 |", "0.580 |")
    assert len(card.card_mismatches(wrong, results, REPO, files, faithfulness)) == 2


def test_figures_are_shown_if_they_are_published(results):
    text = render(results, ["visualizations/a b_layers.png"])
    assert "![Attention maps of one image in every layer](<visualizations/a b_layers.png>)" in text
    assert "Deletion" not in text
    assert "confusion_matrix.png" not in text
    assert "recipe.yaml" not in text


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"value: 0\.\d+", "value: 0.99"),
        (r"\| Accuracy \| [\d.]+", "| Accuracy | 99.00"),
        (r"\| 7 \| [\d.]+", "| 7 | 0.9900"),
        (r"\*\*[\d.]+ %\*\*", "**99.00 %**"),
        (r"\| 3 \|.*\n", ""),
        (r"photographs \| [\d.]+", "photographs | 99.00"),
        (r"\n$", "\n\nIt was tested in hospitals.\n"),
        (r"## Usage", "<!-- hidden -->\n## Usage"),
        (r"- vision", "- medical"),
        (r"\n", "\r\n"),
        (r"(?s)^---.*?---\n", ""),
        (r"library_name:", "library_name: ]["),
        (r"(?s)^---.*?---\n", "---\n- list\n---\n"),
        (r"model-index:", "model-index: 3\nx:"),
    ],
)
def test_any_edit_of_the_card_is_found(results, pattern, replacement):
    text = render(results)
    files = ["recipe.yaml", "confusion_matrix.png"]
    edited = re.sub(pattern, replacement, text, count=1)
    assert edited != text
    lines = card.card_mismatches(edited, results, REPO, files)
    assert 1 <= len(lines) <= card.SHOWN_LINES
    assert all(line[0] in "+-" and len(line) <= card.SHOWN_WIDTH for line in lines)


def test_the_license_is_read_from_the_card_itself(results):
    for license in ("mit", None, ["mit", "apache-2.0"]):
        text = card.render(results, REPO, license, [])
        assert card.card_mismatches(text, results, REPO, []) == []
