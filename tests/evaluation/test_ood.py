import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from pipeline.data.loading import load_splits
from pipeline.data.sources import digits
from pipeline.errors import UserError
from pipeline.evaluation import ood
from pipeline.evaluation.evaluate import evaluate, save
from pipeline.evaluation.outputs import predict
from pipeline.recipe import DataArguments, load_recipe
from pipeline.training.model import load_model
from pipeline.training.train import train
from samples import draw_image, image_processor

DIGITS = DataArguments(dataset="digits")


def normal(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_scores_are_the_papers_formulas():
    logits = torch.tensor([[0.0, 0.0], [3.0, -1.0]])
    expected = torch.log(torch.tensor([2.0, torch.e**3 + torch.e**-1]))
    torch.testing.assert_close(ood.Detector("energy", 0.0).score(logits, logits), expected)
    expected = torch.tensor([0.5, 1 / (1 + torch.e**-4)])
    torch.testing.assert_close(ood.Detector("msp", 0.0).score(logits, logits), expected)
    mean, precision = torch.tensor([1.0, 0]).double(), torch.diag(torch.tensor([4.0, 1])).double()
    detector = ood.Detector("mahalanobis", 0.0, mean, precision)
    expected = torch.tensor([-4.0, -(4 * 4 + 1)])
    torch.testing.assert_close(detector.score(logits, logits), expected)


def test_auroc_is_scikit_learns_and_its_interval_covers_it():
    # Normal scores of distance 1 have an AUROC of 0.7602.
    intervals = []
    for seed in range(200):
        inside, outside = normal(80, seed=seed) + 1, normal(50, seed=seed + 1000)
        area, interval = ood.auroc(inside, outside)
        truth = [1] * 80 + [0] * 50
        assert area == pytest.approx(roc_auc_score(truth, torch.cat([inside, outside])))
        intervals.append(interval)
    covered = np.mean([low <= 0.7602 <= high for low, high in intervals])
    assert 0.91 <= covered <= 0.98


def test_shuffled_patches_are_the_same_pixels_elsewhere():
    images = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    shuffled = ood.shuffle_patches(images)
    assert shuffled.shape == images.shape
    assert not torch.equal(shuffled, images)
    for before, after in zip(images.flatten(1), shuffled.flatten(1), strict=True):
        assert torch.equal(before.sort().values, after.sort().values)
    patches = {
        tuple(p.flatten().tolist())
        for p in images[0, 0].unfold(0, 2, 2).unfold(1, 2, 2).flatten(0, 1)
    }
    assert tuple(shuffled[0, 0, 2:4, 4:6].flatten().tolist()) in patches


def test_ood_images_are_decoded_at_no_more_than_the_models_size(tmp_path, monkeypatch):
    monkeypatch.setattr(ood, "IMAGES", 500)
    others = ood.ood_datasets(image_processor(98))
    sizes = {"handwritten digits": 500, "photographs": 120, "uniform noise": 500}
    assert {name: len(images) for name, images in others.items()} == sizes
    assert max(max(images.features["image"].shape) for images in others.values()) <= 98
    Image.new("RGB", (300, 200)).save(tmp_path / "unlabeled.png")
    assert ood.load_images(str(tmp_path), image_processor(32)).features["image"].shape == (
        3,
        32,
        32,
    )
    with pytest.raises(UserError, match="Cannot load the OOD dataset"):
        ood.load_images(str(tmp_path / "none"), image_processor(32))


def test_ood_datasets_of_a_user_are_checked_before_anything_is_predicted(tmp_path):
    for name, count in (("a/birds", 20), ("b/birds", 20), ("photographs", 20), ("few", 3)):
        (tmp_path / name).mkdir(parents=True)
        for i in range(count):
            draw_image(i).save(tmp_path / name / f"{i}.png")
    processor = image_processor(32)

    def load(*names: str) -> dict:
        return ood.load_others(tuple(str(tmp_path / name) for name in names), "test", processor)

    assert {name: len(data) for name, data in load("a/birds").items()} == {"birds": 20}
    for names in (("a/birds", "b/birds"), ("photographs",)):
        with pytest.raises(UserError, match="There are two OOD datasets or splits of the name"):
            load(*names)
    with pytest.raises(UserError, match=r"few\" has 3 images; OOD detection needs 20"):
        load("few")


def test_digits_are_not_ood_for_a_classifier_of_digits(measured):
    digits().to_parquet("mnist/train.parquet")
    rates = evaluate("models/tiny", DataArguments(dataset="mnist"))["ood"]["ood_datasets"]
    assert set(rates) == {"photographs", "uniform noise", "shuffled patches"}


@pytest.mark.slow
def test_the_published_detector_gives_the_published_rates(tiny_recipe, here):
    train(load_recipe(tiny_recipe, ["--num_train_epochs=2"], "run"))
    results = evaluate("models/run", DIGITS)
    save(results, here / "results/run")
    entry = results["ood"]
    assert entry["pass_rate"]["validation"] == pytest.approx(ood.TARGET_TPR, abs=0.02)
    # Digits are no other thing here.
    names = {"photographs", "uniform noise", "shuffled patches"}
    assert set(entry["ood_datasets"]) == set(entry["auroc"]) == names
    assert set(entry["scores"]) == set(ood.SCORES)
    rates = {s: np.mean([e["fpr95"] for e in t.values()]) for s, t in entry["scores"].items()}
    assert rates[entry["score"]] <= min(rates.values()) + 0.05  # chosen on the other halves

    detector = ood.load_detector("models/run")
    model, processor = load_model("models/run")
    test = load_splits(DIGITS, processor, "test")["test"]
    photographs = ood.ood_datasets(processor)["photographs"]
    rate = {}
    for name, images in (("test", test), ("photographs", photographs)):
        logits, _, features = predict(model, processor, images, depth=ood.DEPTH)
        rate[name] = (detector.score(logits, features) >= detector.threshold).double()
    assert rate["test"].mean().item() == pytest.approx(entry["pass_rate"]["test"])
    expected = entry["ood_datasets"]["photographs"]
    assert rate["photographs"][1::2].mean().item() == pytest.approx(expected)
    (here / "models/run/config.json").write_text("{}")
    assert ood.load_detector("models/run") is None  # not of these files
