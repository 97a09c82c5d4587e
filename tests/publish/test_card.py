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
    results["dataset"] |= {"published_split": "test", "is_part": False}
    results["recipe"] |= {"model": "facebook/dinov2-small", "model_revision": "cd" * 20}
    results["recipe"] |= {"dataset": "uoft-cs/cifar10", "dataset_revision": "ab" * 20}
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


def publication(files=("recipe.yaml", "confusion_matrix.png"), **facts) -> dict:
    listed = {"files": dict.fromkeys(files), "code_url": None, "space": None, "examples": {}}
    return listed | {"license": "apache-2.0"} | facts


def render(results: dict, files=("recipe.yaml", "confusion_matrix.png"), **facts) -> str:
    return card.render(results, REPO, publication(files, **facts))


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
    f1 = next(r for r in data.eval_results if r.metric_type == "f1")
    assert (f1.metric_value, f1.metric_args) == (results["macro_f1"], {"average": "macro"})
    assert (accuracy.dataset_type, accuracy.dataset_config) == ("uoft-cs/cifar10", "plain_text")
    assert (accuracy.dataset_split, accuracy.dataset_revision) == ("test", "ab" * 20)


def test_the_widget_has_example_images_and_their_outputs(results):
    data = ModelCard(render(results, examples={"examples/00003.jpg": 3})).data.to_dict()
    label = results["labels"][results["predictions"][3]]
    output = {"label": label, "score": results["confidences"][3]}
    address = f"https://huggingface.co/{REPO}/resolve/main/examples/00003.jpg"
    example = {"src": address, "example_title": "Test image 3", "output": [output]}
    assert data["widget"] == [example]


def test_the_card_is_a_page_long(results):
    text = render(results, ["recipe.yaml", "confusion_matrix.png", "visualizations/overview.jpg"])
    shown = re.sub(r"(?s)<details>.*?</details>|^---.*?---", "", text)
    assert len(shown.splitlines()) < 60
    assert text.lower().count("apache-2.0") == 2  # metadata and text


def test_the_tables_have_the_numbers_of_the_results(results):
    text = render(results)
    assert f"is **{100 * results['accuracy']:.2f} %** (95 % interval" in text
    numbers = (results["macro_f1"], results["nll"], results["ece"])
    assert "| " + " | ".join(f"{number:.4f}" for number in numbers) + " |" in text
    assert f"| 7 | {results['precision'][7]:.4f} | {results['recall'][7]:.4f} |" in text
    ood = results["ood"]
    assert f"at least {ood['threshold']:.3f}. With\nthis threshold, 95 %" in text
    assert f"| test split | {100 * ood['pass_rate']['test']:.2f} % |" in text
    assert f"| OOD: photographs | {100 * ood['ood_datasets']['photographs']:.2f} % |" in text
    for rest_of_the_template in ("None", "{{", "{%", "\n\n\n"):
        assert rest_of_the_template not in text


def test_what_else_was_measured_has_its_section(results):
    text = render(results, ["reliability.png"])
    for score in ("energy", "msp", "mahalanobis"):
        entry = results["ood"]["scores"][score]["uniform noise"]
        low, high = entry["auroc_interval"]
        interval = f" ({low:.4f} to {high:.4f})" if entry["auroc"] < 1 else ""
        assert f"| uniform noise | {score} | {entry['auroc']:.4f}{interval} |" in text
    assert f"| after | {results['calibration']['after']['ece']:.4f} |" in text
    assert "(reliability.png)" in text
    for absent in ("near-duplicates", "corruptions", "seed"):
        assert absent not in text.split("## Usage")[0]
    share = {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "images": 300, "removed": 60}
    results["without_near_duplicates"] = share
    results["robustness"] = {
        "accuracy": {"shot_noise": [0.5, 0.4, 0.3, 0.2, 0.1]}, "images": 90,
        "mean_accuracy": 0.3, "mean_accuracy_interval": [0.25, 0.35],
    }  # fmt: skip
    seeds = {"mean": 0.52, "interval": [0.47, 0.57], "values": [0.5, 0.52, 0.54]}
    results["seeds"] = {"accuracy": seeds}
    text = render(results)
    assert "On the 300 images without near-duplicates" in text
    assert "it is 50.00 % (40.00 % to 60.00 %)" in text
    assert "is 30.00 % (25.00 % to 35.00 %)" in text
    assert "of 3 runs with different seeds is 52.00 % (95 % interval of the mean" in text
    assert "| shot noise | 50.00 % | 40.00 % | 30.00 % | 20.00 % | 10.00 % |" in text
    assert "\n\n\n" not in text


def test_the_smallest_copy_that_is_published_is_the_one_in_the_snippet(results):
    keys = ("accuracy", "same_class", "ms_per_image", "bytes")
    copy = dict.fromkeys(keys, 1) | {"accuracy_interval": [0.9, 1], "precision": "float32"}
    about = {"images": 20, "hardware": "a CPU"}
    for dtypes in (["fp32"], ["fp32", "fp16"], ["fp32", "q8"]):
        variants = {f"model_{dtype}.onnx": copy | {"dtype": dtype} for dtype in dtypes}
        text = render(results, onnx=about | {"variants": variants})
        assert f"{{ dtype: '{dtypes[-1]}' }}" in text


def test_the_classes_are_folded_and_many_are_not_listed(results):
    assert "10 classes: 0, 1, 2, 3" in render(results)
    results["labels"] = [f"class {i} | {i}" for i in range(21)]
    for key in ("precision", "recall", "f1", "support"):
        results[key] = [1] * 21
    text = render(results)
    assert "21 classes. It is" in text
    assert re.search(
        r"(?s)</summary>\n\n\| Class .*\| class 20 \\\| 20 \|[^\n]*\n\n.*</details>", text
    )


def test_a_run_without_validation_shows_no_validation_accuracy(results):
    results["training"] = {
        "epochs": 1.0, "training_images": 900, "wall_s": 60, "hardware": "2 cores",
        "precision": "no", "validation_accuracy": 0.5, "validation_images": 100, "best_step": 7,
    }  # fmt: skip
    checkpoint = "| Checkpoint | step 7, with a validation accuracy of 50.00 % on 100 images |"
    assert checkpoint in render(results)
    results["training"] |= {"validation_accuracy": None, "best_step": None}
    text = render(results)
    assert "Checkpoint" not in text
    assert "float32 |\n| " in text  # the table goes on


def test_the_evaluated_split_is_named_as_it_is(results):
    assert "accuracy on the `test` split is" in render(results)
    assert "were not used for training or for choosing the checkpoint" in render(results)
    results["dataset"] |= {"published_split": "train", "is_part": True}
    text = render(results)
    assert "accuracy on the images split off the `train` split before training is" in text
    assert "images split off the `train` split before training at revision `abab" in text
    assert ModelCard(text).data.eval_results[0].dataset_split == "train"
    results["dataset"] |= {"split": "validation", "published_split": "val", "is_part": False}
    text = render(results)
    assert "accuracy on the `val` split" in text
    assert "not used for training" not in text


def test_a_model_evaluated_on_another_dataset_is_not_said_to_be_trained_on_it(results):
    results["dataset"] |= {"name": "me/other", "published_split": "train", "is_part": True}
    text = render(results)
    assert ModelCard(text).data.datasets == ["uoft-cs/cifar10"]
    assert (
        "fine-tuned on [uoft-cs/cifar10](https://huggingface.co/datasets/uoft-cs/cifar10)." in text
    )
    link = "[me/other](https://huggingface.co/datasets/me/other)"
    assert f"images split off the `train` split of another dataset, {link}, is **" in text
    assert "not used for training" not in text
    assert "before training" not in text
    results["recipe"] |= {"dataset": "digits", "dataset_revision": None}
    text = render(results)
    assert "fine-tuned on `digits` (a scikit-learn dataset)." in text
    assert ModelCard(text).data.datasets is None


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        (
            {"model_config": {"model_type": "vit"}},
            "It is\na small Vision Transformer, trained from",
        ),
        (
            {"model_config": {"model_type": "resnet"}},
            "It is\na `resnet` model, trained from scratch",
        ),
        (None, "It is\na model of unknown training, evaluated on [uoft-cs/cifar10]"),
    ],
)
def test_what_is_not_known_of_the_training_is_not_claimed(results, recipe, sentence):
    results["recipe"] = recipe
    text = render(results)
    assert sentence in text
    assert ("not used for training" in text) == (recipe is not None)


def test_class_names_are_shown_literally(results):
    results["labels"] = ["a|b", "<unk>", "__background__", "line\nbreak", "😀", *"vwxyz"]
    results["ood"]["scores"] = {}
    text = render(results, examples={"examples/00001.jpg": 0})
    assert r"a\|b, \<unk\>, \_\_background\_\_, line break, 😀, v" in text
    rows = [line for line in text.splitlines() if line.startswith((r"| a\|b |", "| line break |"))]
    assert [row.replace(r"\|", "").count("|") for row in rows] == [6, 6]
    results["predictions"] = [4] * len(results["predictions"])
    card_data = ModelCard(render(results, examples={"examples/00001.jpg": 0})).data
    assert card_data.widget[0]["output"][0]["label"] == "😀"


def test_local_folders_are_named_as_local_and_not_linked(results):
    results["dataset"] |= {"name": "./photos", "config": None, "revision": None, "local": True}
    results["recipe"] = {"model": "./dinov2-small", "model_revision": None}
    text = render(results, license=None)
    data = ModelCard(text).data
    assert (data.base_model, data.datasets, data.license) == (None, None, None)
    local = "It is\n`dinov2-small` (a local model), fine-tuned on `photos` (a local dataset)."
    assert local in text
    assert "| License | that of `dinov2-small`, which could not be determined" in text


def test_attention_methods_are_compared_with_a_random_order(results, faithfulness):
    files = ["visualizations/overview.jpg"]
    text = card.render(results, REPO, publication(files), faithfulness)
    row = "| mean | 0.400 | +0.100 (+0.050 to +0.150) "
    row += "| 0.480 | -0.020 (-0.070 to +0.030), not better than random |"
    assert row in text
    assert "| random | 0.500 | | 0.500 | |" in text
    assert card.mismatches(text, text) == []
    assert len(card.mismatches(text.replace("0.480 |", "0.580 |"), text)) == 2


def test_figures_are_shown_if_they_are_published(results):
    text = render(results, ["visualizations/a b_layers.jpg", "visualizations/overview.jpg"])
    assert "![Attention maps of one image in every layer](<visualizations/a b_layers.jpg>)" in text
    assert "![Attention maps of several images" in text.partition("<details>")[0]
    assert "Deletion" not in text
    assert "confusion_matrix.png" not in text
    assert "recipe.yaml" not in text


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"value: 0\.\d+", "value: 0.99"),
        (r":-:\|\n\| [\d.]+", ":-:|\n| 0.9900"),
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
    edited = re.sub(pattern, replacement, text, count=1)
    assert edited != text
    lines = card.mismatches(edited, text)
    assert 1 <= len(lines) <= card.SHOWN_LINES
    assert all(line[0] in "+-" and len(line) <= card.SHOWN_WIDTH for line in lines)
