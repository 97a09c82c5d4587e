"""Fitting the head before fine-tuning."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from pipeline.data.decoding import DecodedImages
from pipeline.data.loading import load_split
from pipeline.errors import UserError
from pipeline.evaluation.outputs import predict
from pipeline.recipe import ModelArguments, load_recipe
from pipeline.training import linear_probe, model, trainer
from pipeline.training.linear_probe import PENALTY, fit_head
from pipeline.training.model import build_model, build_processor
from pipeline.training.train import train

DIGITS = [str(n) for n in range(10)]


@pytest.mark.parametrize("classes", [3, 2])
def test_it_fits_as_scikit_learn_does(classes):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, 300)
    features = generator.normal(size=(300, 5)) * [1, 2, 3, 4, 50] + labels[:, None]
    inputs = torch.tensor(features).float(), torch.tensor(labels)
    weight, bias = linear_probe._logistic_regression(*inputs, classes)
    scale = inputs[0].std(dim=0).numpy()
    # One of two classes has half of the difference each, so each weight is penalized half as much.
    strength = 1 / (2 * PENALTY * len(labels)) * (2 if classes == 2 else 1)
    classifier = LogisticRegression(C=strength, tol=1e-8, max_iter=1000).fit(
        features / scale, labels
    )
    logits = torch.nn.functional.linear(inputs[0], weight, bias)
    np.testing.assert_allclose(
        logits.softmax(dim=1), classifier.predict_proba(features / scale), atol=1e-3
    )


def test_a_class_without_images_is_unlikely_and_finite():
    features, labels = torch.randn(60, 4), torch.arange(60) % 2 * 2  # classes 0 and 2 of 3
    weight, bias = linear_probe._logistic_regression(features, labels, 3)
    probabilities = torch.nn.functional.linear(features, weight, bias).softmax(dim=1)
    assert probabilities[:, 1].max() < 0.01


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_the_fitted_head_classifies_and_the_backbone_stays(backbones, kind):
    arguments = ModelArguments(backbones[kind], image_size=32)
    processor = build_processor(arguments)
    images = load_split(load_recipe("demo").data, "train", processor)
    network = build_model(arguments, DIGITS).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    share = fit_head(network, processor, DecodedImages(images), len(images), 32)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    changed = {name for name, v in network.state_dict().items() if not torch.equal(v, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    logits, labels = predict(network, processor, images)
    assert share > 0.4  # of ten classes, with features of random weights
    assert (logits.argmax(dim=1) == labels).float().mean().item() == pytest.approx(share, abs=0.01)


def test_it_fits_at_the_first_size_of_the_schedule_and_once(tiny_recipe, monkeypatch):
    calls = []
    monkeypatch.setattr(
        trainer, "fit_head", lambda *options: calls.append(options[-2:]) or fit_head(*options)
    )
    options = ["--image_size_schedule={0: 16, 0.5: 32}", "--linear_probe_samples=100"]
    options += ["--max_steps=4", "--eval_strategy=steps", "--eval_steps=2"]
    options += ["--save_strategy=steps", "--save_steps=2"]
    recipe = load_recipe(tiny_recipe, options, "run")
    train(recipe)
    assert calls == [(100, 16)]
    for path in (recipe.model_folder, recipe.checkpoint_folder / "checkpoint-4"):
        path.rename(path.with_name("aside"))
    train(load_recipe(tiny_recipe, options, "run"))  # resumes from step 2
    assert calls == [(100, 16)]


@pytest.mark.parametrize(("count", "taken"), [(500, 20), (15, 15)])
def test_as_many_images_are_used_as_asked_for_or_all(backbones, monkeypatch, count, taken):
    seen = []

    def regression(features, labels, classes):
        seen.append(len(features))
        return original(features, labels, classes)

    original = linear_probe._logistic_regression
    monkeypatch.setattr(linear_probe, "_logistic_regression", regression)
    arguments = ModelArguments(backbones["vit"], image_size=32)
    processor = build_processor(arguments)
    images = load_split(load_recipe("demo").data, "train", processor).select(range(20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_head(build_model(arguments, DIGITS), processor, DecodedImages(images), count, 32)
    assert seen == [taken]


def test_a_model_with_two_last_layers_is_refused(backbones, monkeypatch):
    monkeypatch.setattr(model, "output_layers", lambda network: [nn.Linear(2, 2)] * 2)
    arguments = ModelArguments(backbones["vit"], image_size=32, linear_probe_samples=10)
    with pytest.raises(UserError, match="one last linear layer, which ViTFor.* has not: set --lin"):
        build_model(arguments, DIGITS)


def test_a_stream_is_refused(tiny_recipe):
    options = ["--streaming", "--max_steps=5", "--linear_probe_samples=10"]
    with pytest.raises(UserError, match="set --linear_probe_samples=0"):
        load_recipe(tiny_recipe, options)
