from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from pipeline.data.loading import load_split
from pipeline.evaluation.outputs import predict
from pipeline.evaluation.robustness import PARAMETERS, corrupt, measure_robustness
from pipeline.recipe import DataArguments
from pipeline.training.model import load_model

NOISE = [name for name in PARAMETERS if name.endswith("noise")]
# A temple, (427, 640, 3): not square, and large enough for ImageNet-C's parameters.
IMAGE = load_sample_images().images[0]
BATCH = torch.from_numpy(IMAGE.copy()).permute(2, 0, 1)[None]


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_corruption_is_that_of_imagenet_c(name, severity):
    reference = pytest.importorskip("corrupt_tta").corrupt
    np.random.seed(0)
    expected = np.floor(reference(IMAGE, severity, name))  # ImageNet-C rounds down
    ours = corrupt(BATCH, name, severity, torch.Generator().manual_seed(0))
    ours = ours[0].permute(1, 2, 0).double().numpy()
    if name in NOISE:  # the same distribution of changes, in dark and in bright pixels
        for part in (IMAGE < 100, IMAGE >= 100):
            for moment in (np.mean, np.std):
                first, second = (moment((x - IMAGE)[part]) for x in (ours, expected))
                assert first == pytest.approx(second, abs=0.03 * np.std((expected - IMAGE)[part]))
    else:  # but for rounding
        assert np.abs(ours - expected).max() <= 1
        assert (ours != expected).mean() < 0.03


def test_small_images_get_the_parameters_of_cifar_10_c():
    small = BATCH[:, :, :32, :32]
    changes = []
    for batch in (small, BATCH):
        noisy = corrupt(batch, "gaussian_noise", 1, torch.Generator().manual_seed(0))
        inner = (batch > 60) & (batch < 190)  # not clipped
        changes.append((noisy.double() - batch)[inner].std().item() / 255)
    assert changes == pytest.approx([0.04, 0.08], rel=0.05)


@pytest.mark.slow
def test_the_interval_of_the_corrupted_accuracy_stays_below_one():
    calls = []

    def run(dataset, transform):
        calls.append(transform)
        logits = torch.eye(2)[torch.zeros(10, dtype=int)]
        logits[0] = torch.tensor([0.0, 1.0]) if len(calls) % 2 else logits[0]
        return logits, torch.zeros(10, dtype=int)

    report = measure_robustness(run, torch.device("cpu"), None)
    assert 0.9 < report["mean_accuracy"] < 1
    assert report["mean_accuracy_interval"][1] == 1


def test_robustness_is_the_accuracy_on_corrupted_images(measured):
    model, processor = load_model("models/tiny")
    test = load_split(DataArguments(dataset="digits"), "test", processor).select(range(40))
    run = partial(predict, model, processor)
    results = measure_robustness(run, model.device, test)
    again = measure_robustness(partial(run, batch_size=40), model.device, test)
    assert results == again
    table = results["accuracy"]
    assert set(table) == set(PARAMETERS)
    assert results["mean_accuracy"] == pytest.approx(np.mean([*table.values()]))
    low, high = results["mean_accuracy_interval"]
    assert low < results["mean_accuracy"] < high
    pixels = torch.tensor(test["image"][:], dtype=torch.uint8)
    contrast = corrupt(pixels, "contrast", 5, torch.Generator())
    logits, labels = run(test, transform=lambda _: contrast)
    assert table["contrast"][4] == (logits.argmax(dim=1) == labels).double().mean().item()
