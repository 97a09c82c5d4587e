import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, pipeline

from pipeline.evaluation import ood
from pipeline.evaluation.evaluate import evaluate
from pipeline.recipe import DataArguments, load_recipe
from pipeline.training.train import train
from samples import image_processor


def test_scores_are_the_log_of_the_summed_exponentials():
    logits = torch.tensor([[0.0, 0.0], [3.0, -1.0]])
    expected = torch.log(torch.tensor([2.0, torch.e**3 + torch.e**-1]))
    torch.testing.assert_close(ood.energy_score(logits), expected)


def test_the_threshold_passes_the_target_share_of_validation():
    logits = torch.randn(2000, 10, generator=torch.Generator().manual_seed(0))
    threshold = ood.fit_threshold(logits)
    assert ood.pass_rate(logits, threshold) == pytest.approx(ood.TARGET_TPR, abs=1e-3)
    assert ood.pass_rate(logits + 100, threshold) == 1


def test_ood_images_are_decoded_at_no_more_than_the_models_size():
    for size in (32, 98):
        others = ood.ood_datasets(image_processor(size))
        assert {name: len(d) for name, d in others.items()} == {
            "handwritten digits": ood.DIGITS,
            "photographs": 120,
        }
        for decoded in others.values():
            assert max(decoded.features["image"].shape) <= size


@pytest.mark.slow
def test_evaluation_reports_how_many_images_pass(tiny_recipe):
    train(load_recipe(tiny_recipe, ["--num_train_epochs=1"], "run"))
    results = evaluate("models/run", DataArguments(dataset="digits"))["ood"]
    assert results["pass_rate"]["validation"] == pytest.approx(ood.TARGET_TPR, abs=0.02)
    assert set(results["ood_datasets"]) == {"photographs"}  # digits are no other thing here

    size = AutoConfig.from_pretrained("models/run").image_size
    pieces = ood.ood_datasets(image_processor(size))["photographs"]
    answer = pipeline("image-classification", "models/run")
    passed = 0
    for row in pieces:
        image = Image.fromarray(np.asarray(row["image"], np.uint8).transpose(1, 2, 0))
        with torch.no_grad():
            logits = answer.model(**answer.preprocess(image)).logits
        passed += ood.pass_rate(logits, results["threshold"])
    assert results["ood_datasets"]["photographs"] == pytest.approx(passed / len(pieces), abs=0.02)
