import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, pipeline

from pipeline import evaluation, familiarity
from pipeline.recipe import DataArguments, load_recipe
from pipeline.training import train


def test_scores_are_the_log_of_the_summed_exponentials():
    logits = torch.tensor([[0.0, 0.0], [3.0, -1.0]])
    expected = torch.log(torch.tensor([2.0, torch.e**3 + torch.e**-1]))
    torch.testing.assert_close(familiarity.scores(logits), expected)


def test_the_threshold_lets_the_set_share_pass():
    logits = torch.randn(2000, 10, generator=torch.Generator().manual_seed(0))
    threshold = familiarity.fit(logits)
    assert familiarity.share(logits, threshold) == pytest.approx(familiarity.PASSING, abs=1e-3)
    assert familiarity.share(logits + 100, threshold) == 1


def test_other_pictures_are_decoded_at_no_more_than_the_models_size():
    for size in (32, 98):
        others = familiarity.other_pictures(size, resample=2)
        assert {name: len(d) for name, d in others.items()} == {
            "handwritten digits": familiarity.DIGITS,
            "photographs": 120,
        }
        for decoded in others.values():
            assert max(decoded.features["image"].shape) <= size


def test_evaluation_says_how_many_pictures_pass(tiny_recipe):
    train(load_recipe(tiny_recipe, ["--num_train_epochs=1"], "run"))
    found = evaluation.evaluate("models/run", DataArguments(dataset="digits"))["familiarity"]
    assert found["validation"] == pytest.approx(familiarity.PASSING, abs=0.02)
    assert set(found["others"]) == {"photographs"}  # digits are no other thing here

    size = AutoConfig.from_pretrained("models/run").image_size
    pieces = familiarity.other_pictures(size, resample=2)["photographs"]
    answer = pipeline("image-classification", "models/run")
    passed = 0
    for row in pieces:
        image = Image.fromarray(np.asarray(row["image"], np.uint8).transpose(1, 2, 0))
        with torch.no_grad():
            logits = answer.model(**answer.preprocess(image)).logits
        passed += familiarity.share(logits, found["threshold"])
    assert found["others"]["photographs"] == pytest.approx(passed / len(pieces), abs=0.02)
