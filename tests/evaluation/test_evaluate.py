import hashlib
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate_vit
from pipeline.data.loading import load_split
from pipeline.errors import UserError, run_main
from pipeline.evaluation.evaluate import _without, as_text, evaluate
from pipeline.recipe import DataArguments, load_recipe
from pipeline.training.train import train
from samples import draw_image, image_processor, run_script

DIGITS = DataArguments(dataset="digits")


def test_results_are_what_pipeline_gives_image_by_image(trained):
    from transformers import pipeline

    results = evaluate(trained, DIGITS)
    test = load_split(DIGITS, "test", image_processor())
    images = [
        Image.fromarray(torch.tensor(row["image"], dtype=torch.uint8).permute(1, 2, 0).numpy())
        for row in test
    ]
    answers = pipeline("image-classification", trained, batch_size=60)(images, top_k=1)
    predicted = [int(answer[0]["label"]) for answer in answers]
    assert results["predictions"] == predicted
    right = sum(p == t for p, t in zip(predicted, test["label"], strict=True))
    assert results["accuracy"] == right / 360
    low, high = results["accuracy_interval"]
    assert low < results["accuracy"] < high


@pytest.mark.slow
def test_results_carry_what_they_were_computed_from(trained):
    results = evaluate(trained, DIGITS)
    for name, expected in results["model"]["sha256"].items():
        assert hashlib.sha256((Path(trained) / name).read_bytes()).hexdigest() == expected
    assert set(results["model"]["sha256"]) == {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
    }
    assert results["dataset"]["images"] == 360
    assert len(results["dataset"]["sha256"]) == 64
    assert results["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(results)) == results


@pytest.mark.slow
def test_another_split_and_batch_size_give_their_own_numbers(trained):
    validation = evaluate(trained, DIGITS, split="validation", batch_size=7)
    assert validation["dataset"]["images"] == 72
    assert "split validation, 72 images" in as_text(validation)
    whole = evaluate(trained, DIGITS, batch_size=360)
    assert evaluate(trained, DIGITS, batch_size=7)["accuracy"] == whole["accuracy"]


@pytest.mark.slow
def test_a_first_look_says_so_and_is_close(trained, monkeypatch):
    whole = evaluate(trained, DIGITS)
    monkeypatch.setattr("pipeline.runs.has_fast_bfloat16", lambda: True)
    rounded = evaluate(trained, DIGITS, bf16=True)
    assert (whole["dtype"], rounded["dtype"]) == ("float32", "bfloat16")
    assert rounded["nll"] != whole["nll"]
    assert rounded["nll"] == pytest.approx(whole["nll"], abs=0.02)
    assert rounded["accuracy"] == pytest.approx(whole["accuracy"], abs=0.02)
    assert "bfloat16" in as_text(rounded)


def test_a_changed_folder_is_noticed_however_it_is_written(image_folder, tiny_recipe, monkeypatch):
    options = [f"--dataset={image_folder}", "--max_steps=1", "--calibrate=false"]
    train(load_recipe(tiny_recipe, options, "run"))
    names = str(image_folder), os.path.relpath(image_folder), f"{image_folder}/../pets"
    for name in names:
        assert evaluate("models/run", DataArguments(dataset=name))["dataset"]["images"] == 8
    draw_image(7).save(image_folder / "train/cat/new.png")
    for name in names:
        with pytest.raises(UserError, match="are not the images that models/run was trained on"):
            evaluate("models/run", DataArguments(dataset=name))


def test_without_any_image_left_there_is_no_accuracy():
    logits, labels = torch.eye(2), torch.tensor([0, 1])
    assert _without([0], logits, labels)["accuracy"] == 1.0
    assert _without([0, 1], logits, labels) is None
    assert _without(None, logits, labels) is None


def test_a_dataset_of_other_classes_is_refused(trained, image_folder):
    with pytest.raises(UserError, match=r"10 classes \(0, 1, 2 and 7 more\).* 2 \(cat, dog\)"):
        evaluate(trained, DataArguments(dataset=str(image_folder)))


@pytest.mark.slow
def test_the_script_evaluates_the_last_run_and_writes_everything(
    trained, here, monkeypatch, capsys
):
    run_script(monkeypatch, evaluate_vit.main)
    assert {p.name for p in (here / "results/run").iterdir()} == {
        "evaluation_results.txt",
        "evaluation_results.json",
        "training_curves.png",
        "confusion_matrix.png",
        "reliability.png",
        "manifest.json",
    }
    assert (here / "results/evaluation_results.txt").readlink() == Path(
        "run/evaluation_results.txt"
    )
    results = json.loads((here / "results/run/evaluation_results.json").read_text())
    text = (here / "results/evaluation_results.txt").read_text()
    assert f"{results['accuracy']:.2%}" in text
    assert text in capsys.readouterr().out
    assert results["training"]["steps"] == 88
    for figure in ("training_curves.png", "confusion_matrix.png"):
        with Image.open(here / "results/run" / figure) as image:
            assert image.width > 500
            assert len(image.convert("L").getcolors(256)) > 20  # something is drawn


def test_nothing_to_evaluate_is_one_line(here, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        run_script(monkeypatch, partial(run_main, evaluate_vit.main))
    message = "There is no trained model in models/: train one, or name one with MODEL=."
    assert ended.value.code == f"Error: {message}"
