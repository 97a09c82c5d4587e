import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import pipeline

import train_vit
from pipeline.data.loading import load_split
from pipeline.evaluation import calibration
from pipeline.evaluation.calibration import calibrate_run, fit_temperature, fold_temperature
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.metrics import ImageClassification
from pipeline.evaluation.outputs import predict
from pipeline.recipe import DataArguments, load_recipe
from pipeline.training.model import load_model
from pipeline.training.train import train
from samples import run_script


def test_the_temperature_of_known_logits_is_found():
    # Labels drawn from the probabilities themselves, and the logits then made 2.5 times too sure.
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 10, generator=generator)
    labels = logits.softmax(dim=1).multinomial(1, generator=generator).squeeze(1)
    temperature = fit_temperature(2.5 * logits, labels)
    assert temperature == pytest.approx(2.5, rel=0.03)
    scaled = 2.5 * logits.double() / temperature
    steps = [F.cross_entropy(scaled * factor, labels) for factor in (0.98, 1.0, 1.02)]
    assert steps[1] == min(steps)
    metric = ImageClassification(keep_in_memory=True)
    ece = [metric.compute(predictions=x, references=labels)["ece"] for x in (2.5 * logits, scaled)]
    assert ece[0] > 0.1
    assert ece[1] < 0.01


def test_no_temperature_is_fit_where_validation_has_no_errors(tiny_recipe, monkeypatch, capsys):
    logits = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, torch.tensor([0, 1])) is None
    assert fit_temperature(logits, torch.tensor([0, 0])) > 1
    recipe = load_recipe(tiny_recipe, ["--max_steps=1"], "run")
    train(recipe)
    monkeypatch.setattr(calibration, "predict", lambda *_: (logits, torch.tensor([0, 1])))
    assert calibrate_run(recipe) == 1.0
    assert "Not calibrated: all 72 validation images" in capsys.readouterr().out


def test_a_folded_temperature_divides_the_logits(backbones):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name in backbones:
        model, _ = load_model(backbones[name])
        with torch.no_grad():
            before = model(images).logits
            fold_temperature(model, 1.7)
            torch.testing.assert_close(model(images).logits, before / 1.7)


@pytest.mark.slow
def test_a_calibrated_run_gives_calibrated_probabilities_by_plain_pipeline(
    tiny_recipe, monkeypatch
):
    options = ["--num_train_epochs=5", "--label_smoothing_factor=0.4", "--calibrate"]
    run_script(monkeypatch, train_vit.main, "--recipe", tiny_recipe, "--run=run", *options)
    data, weights = DataArguments(dataset="digits"), Path("models/run/model.safetensors")
    calibrated, content = evaluate("models/run", data), weights.read_bytes()
    entry = calibrated["calibration"]
    assert entry["folded"] == pytest.approx(entry["temperature"], rel=1e-3)
    assert entry["folded"] < 0.9  # label smoothing makes a model too unsure
    assert entry["after"]["ece"] == pytest.approx(calibrated["ece"], abs=1e-3)
    assert entry["after"]["ece"] < entry["before"]["ece"] / 2
    assert entry["after"]["nll"] < entry["before"]["nll"]
    recipe = load_recipe(tiny_recipe, options, "run")
    assert calibrate_run(recipe) == entry["folded"]  # it is not calibrated again
    assert weights.read_bytes() == content

    # Only the head has changed, so the top class has not; plain pipeline() gives the probabilities.
    step = json.loads(Path("models/run/training.json").read_text())["best_step"]
    before, processor = load_model(f"models/checkpoints/run/checkpoint-{step}")
    model, _ = load_model("models/run")
    states = before.state_dict(), model.state_dict()
    changed = {name for name, value in states[0].items() if not torch.equal(value, states[1][name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    test = load_split(data, "test", processor)
    logits = [predict(m, processor, test)[0] for m in (before, model)]
    assert torch.equal(logits[0].argmax(dim=1), logits[1].argmax(dim=1))
    image = Image.fromarray(np.asarray(test[0]["image"], np.uint8).transpose(1, 2, 0))
    answer = pipeline("image-classification", "models/run")(image, top_k=1)[0]
    assert answer["score"] == pytest.approx(calibrated["confidences"][0], abs=1e-3)

    # As if it had been killed after the weights were written: nothing is folded twice.
    config = json.loads(Path("models/run/config.json").read_text())
    del config["calibration_temperature"]
    Path("models/run/config.json").write_text(json.dumps(config))
    assert calibrate_run(recipe) == pytest.approx(1, abs=1e-3)
