import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

import audit as script
from pipeline.data.sources import load_source
from pipeline.errors import UserError
from pipeline.evaluation.audit import as_text, audit, duplicate_rows, label_errors
from pipeline.evaluation.duplicates import group, near_duplicates
from pipeline.evaluation.evaluate import evaluate
from pipeline.recipe import DataArguments
from samples import draw_image, run_script

TILE = 64


def photograph_tiles() -> list[np.ndarray]:
    """120 tiles of two photographs, no two of which overlap."""
    return [
        photograph[top : top + TILE, left : left + TILE]
        for photograph in load_sample_images().images
        for top in range(0, 384, TILE)
        for left in range(0, 640, TILE)
    ]


def plant_duplicate(
    pixels: np.ndarray, generator: np.random.Generator, least: tuple[float, int] = (0.6, 50)
) -> np.ndarray:
    """A copy, shifted by up to 6 % of its side, resized, and saved as JPEG of a low quality.

    `least` is the smallest size of the copy, and the lowest quality.
    """
    side = len(pixels)
    reach = round(0.06 * side)
    down, right = generator.integers(-reach, reach + 1, 2) + reach
    padded = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    image = Image.fromarray(padded[down : down + side, right : right + side])
    size = round(side * generator.uniform(least[0], 2))
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    image.save(file := io.BytesIO(), "JPEG", quality=int(generator.integers(least[1], 95)))
    return np.asarray(Image.open(file))


def thumbnails(images: list[np.ndarray]) -> torch.Tensor:
    small = [np.asarray(Image.fromarray(i).resize((32, 32), Image.Resampling.BOX)) for i in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)


def find_planted(images: list[np.ndarray], count: int, **options) -> tuple[float, float]:
    """Recall and precision of duplicates planted in images that have none."""
    generator = np.random.default_rng(0)
    sources = generator.choice(len(images), count, replace=False)
    planted = [plant_duplicate(images[i], generator, **options) for i in sources]
    pairs, correlations = near_duplicates(thumbnails([*images, *planted]))
    assert (np.diff(correlations) <= 0).all()
    truth = {(int(source), len(images) + i) for i, source in enumerate(sources)}
    found = {tuple(pair) for pair in pairs.tolist()}
    return len(found & truth) / count, len(found & truth) / len(found)


def test_planted_duplicates_are_found_among_tiles_of_photographs():
    tiles = [tile for tile in photograph_tiles() if tile.std() > 25]  # without clear sky
    recall, precision = find_planted(tiles, 40, least=(0.8, 85))  # they are finely textured
    assert recall >= 0.9
    assert precision >= 0.95


@pytest.mark.slow
def test_planted_duplicates_are_found_among_real_images(shared):
    test = load_source(DataArguments(dataset=str(shared / "data/cifar10"))).splits["test"]
    images = [np.asarray(image) for image in test.select(range(3000))["img"]]
    own, _ = near_duplicates(thumbnails(images))  # those that CIFAR-10 has itself
    images = [images[i] for i in np.setdiff1d(np.arange(3000), own)]
    recall, precision = find_planted(images, 60)
    assert recall >= 0.9
    assert precision >= 0.95


def test_no_image_and_one_have_no_duplicates():
    for count in (0, 1):
        pairs, correlations = near_duplicates(torch.zeros(count, 3, 32, 32, dtype=torch.uint8))
        assert (pairs.shape, len(correlations)) == ((0, 2), 0)


def test_pairs_connect_groups():
    groups = group(np.array([[0, 2], [2, 4], [3, 5]]), 6)
    assert groups[0] == groups[2] == groups[4]
    assert len(set(groups)) == 3


def test_planted_label_errors_come_first():
    source = load_digits()
    labels, generator = source.target.copy(), np.random.default_rng(0)
    flipped = generator.choice(len(labels), 36, replace=False)  # 2 %
    labels[flipped] = (labels[flipped] + generator.integers(1, 10, 36)) % 10
    labels[0] = -1 if 0 not in flipped else labels[0]  # no label
    found, predicted = label_errors(torch.from_numpy(source.data), labels)
    assert ((predicted == -1) == (labels == -1)).all()
    assert 0.85 < (predicted == labels).mean() < 0.98  # at most the labels that were not flipped
    rows = [row for row, _, _ in found]
    first = np.isin(rows[:36], flipped)
    assert first.mean() >= 0.7
    assert np.isin(flipped, rows).mean() >= 0.7
    corrected = [source.target[row] == other for row, other, _ in found if row in flipped]
    assert np.mean(corrected) > 0.9
    probabilities = [probability for *_, probability in found]
    assert probabilities == sorted(probabilities)


def test_an_audit_reports_every_fault(image_folder, here, monkeypatch, capsys):
    train, test = image_folder / "train", image_folder / "test"
    tiles = [Image.fromarray(tile) for tile in photograph_tiles() if tile.std() > 25]
    for i, tile in enumerate(tiles[:6]):
        for folder in (train / "cat", test / "cat", test / "dog"):
            folder.mkdir(exist_ok=True, parents=True)
        tile.save(train / "cat" / f"tile{i}.png")
    tiles[0].save(test / "cat" / "exact.png")
    tiles[1].resize((80, 80)).save(test / "dog" / "other.jpg", quality=80)
    tiles[20].convert("L").save(test / "dog" / "gray.png")
    Image.new("RGB", (50, 40)).save(test / "cat" / "black.png")
    Image.new("RGB", (50, 40), "red").save(test / "cat" / "red.png")
    (test / "cat" / "torn.png").write_bytes(b"\x89PNG")
    run_script(monkeypatch, script.main, "--dataset", str(image_folder))
    folder = here / "results/audit/pets"
    report = json.loads((folder / "audit.json").read_text())
    assert (folder / "report.txt").read_text() in capsys.readouterr().out
    entry = report["splits"]["test"]
    assert entry["classes"] == {"cat": 4, "dog": 2}
    assert entry["modes"] == {"RGB": 4, "L": 1}
    assert entry["sizes"]["80x80"] == 1
    assert {kind: len(names) for kind, names in entry["unusual"].items()} == {
        "unreadable": 1, "nearly_black": 1, "constant": 2,
    }  # fmt: skip
    assert entry["in_earlier_splits"] == [1, 4]  # of the images that can be decoded
    assert [pair["splits"] for pair in report["exact_duplicates"]] == [["train", "test"]]
    pairs = [p for p in report["near_duplicates"] if p["splits"] == ["train", "test"]]
    assert sorted(p["labels"] for p in pairs) == [["cat", "cat"], ["cat", "dog"]]
    assert {path.name for path in folder.glob("*.png")} == {
        f"near_duplicates{of}.png" for of in ("", "_across_splits", "_of_other_labels")
    }


def test_one_of_two_label_columns_can_be_audited(here, monkeypatch, capsys):
    images = [draw_image(i) for i in range(4)]
    names = {"fine": ["cat", "dog", "oak", "elm"], "coarse": ["animal", "plant"]}
    labels = {"fine": [0, 1, 2, 3], "coarse": [0, 0, 1, 1]}
    features = Features(
        {"img": ImageFeature()} | {k: ClassLabel(names=v) for k, v in names.items()}
    )
    Dataset.from_dict({"img": images} | labels, features).to_parquet(here / "two/train-0.parquet")
    with pytest.raises(UserError, match="--label_column"):
        run_script(monkeypatch, script.main, "--dataset", "two")
    run_script(monkeypatch, script.main, "--dataset", "two", "--label_column", "coarse")
    assert "animal" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluation_leaves_out_the_near_duplicates_of_an_audit(measured, capsys):
    data = DataArguments(dataset="digits")
    report, _ = audit(data, "models/tiny", 32)  # an untrained model: label errors are noise
    assert report["label_errors"]
    assert set(report["label_agreement"]) == {"train", "validation", "test"}
    assert ", ".join(f"{s:.1%} in {n}" for n, s in report["label_agreement"].items()) in as_text(
        report
    )
    assert duplicate_rows(load_source(data), "test") is None
    folder = measured / "results/audit/digits"
    folder.mkdir(parents=True)
    (folder / "audit.json").write_text(json.dumps(report))
    rows = duplicate_rows(load_source(data), "test")
    results = evaluate("models/tiny", data)
    part = results["without_near_duplicates"]
    assert part["removed"] == len(rows) > 0
    assert part["images"] == 360 - len(rows)
    low, high = part["accuracy_interval"]
    assert low < part["accuracy"] < high
    limited = replace(data, max_train_samples=50)  # some of the audited training images
    assert duplicate_rows(load_source(limited), "test") == rows
    report["fingerprint"] = "0"  # of other images
    (folder / "audit.json").write_text(json.dumps(report))
    assert duplicate_rows(load_source(data), "test") is None
    assert "without near-duplicates is not reported: run `make audit`" in capsys.readouterr().out
