import json
import subprocess
import sys
import time

import benchmark
import benchmark_example as example
import numpy as np
import pytest
import torch
from benchmark_rows import Pair, _by_the_clock, _Deadline
from conftest import ROOT, draw_image
from PIL import Image
from transformers import TrainingArguments
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil


def test_the_quick_benchmark_measures_every_row(tmp_path):
    result = subprocess.run(
        # The environment is that of this test: nothing is set up.
        ["make", "-o", ".venv/.runs", "bench", "QUICK=1", f"ARGS=--results={tmp_path}",
         f"BIN={sys.prefix}/bin"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / "benchmarks_quick.json").read_text())
    assert list(found) == [row for row in benchmark.ROWS if row != "demo"]
    for row in found.values():
        assert row["quick"]
        assert row["versions"]["torch"] == torch.__version__
        for pair in row["pairs"]:
            sides = [pair[side] for side in ("ours", "theirs", "tuned") if pair[side]]
            assert all(0 < s["least"] <= s["median"] <= s["most"] for s in sides), pair
            assert f"| {pair['what']}, {pair['unit']} |" in result.stdout
    compared = [pair for row in found.values() for pair in row["pairs"] if pair["times"]]
    assert len(compared) >= 7
    with Image.open(tmp_path / "benchmarks_quick.png") as figure:
        assert len(figure.convert("L").getcolors(256)) > 20  # something is drawn


def test_a_row_measured_again_leaves_the_others(tmp_path):
    file = tmp_path / "benchmarks_quick.json"
    kept = {"hardware": "another", "dataset": "digits", "measured": "2026-01-01", "quick": False}
    kept["gflops"] = {"float32": 123.4, "bfloat16": 567.8}
    kept["pairs"] = [benchmark.summary(Pair("Kept", "s", [1.0], target=2))]
    file.write_text(json.dumps({"demo": kept}))
    result = subprocess.run(
        [sys.executable, ROOT / "scripts/benchmark.py", "--quick", "--rows", "recipe",
         f"--results={tmp_path}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(file.read_text())
    assert found["demo"] == kept
    assert found["recipe"]["pairs"][0]["ours"]["median"] > 0
    assert "another, digits, 2026-01-01:" in result.stdout
    assert "| Kept, s | 1 |" in result.stdout
    assert "products there: 123 GFLOP/s in float32, 568 GFLOP/s in bfloat16." in result.stdout
    assert found["recipe"]["gflops"]["float32"] > 1


def test_a_row_that_is_not_there_is_one_line():
    result = subprocess.run(
        [sys.executable, ROOT / "scripts/benchmark.py", "--rows", "train"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith('Error: There is no row "train"; choose from preprocess,')


@pytest.mark.parametrize(
    ("less_is_better", "times", "met"), [(False, 2.5, False), (True, 0.4, False)]
)
def test_a_pair_is_compared_by_medians(less_is_better, times, met):
    pair = Pair("x", "u", [9, 25, 50], [10, 1, 100], target=3, less_is_better=less_is_better)
    found = benchmark.summary(pair)
    assert found["ours"] == {"median": 25, "least": 9, "most": 50, "runs": 3}
    assert found["times"] == pytest.approx(times)
    assert found["met"] is met
    assert "| 3x: missed |" in benchmark.table([found])


def test_a_tuned_example_has_a_target_of_its_own():
    pair = Pair("x", "u", [20], [1], [11], target=10, target_tuned=2)
    assert benchmark.summary(pair)["met"] is False
    pair.tuned = [9]
    assert benchmark.summary(pair)["met"] is True


@pytest.mark.parametrize(("least", "value", "met"), [(False, 1.9, True), (True, 96.9, False)])
def test_a_figure_alone_is_held_against_its_bound(least, value, met):
    pair = Pair("x", "%", [value], target=97 if least else 2, least=least)
    assert benchmark.summary(pair)["met"] is met


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", [0.5, 1, (1 + 0.5**0.5) / 2, 0]),
        ("linear", [0.5, 1, 0.75, 0]),
        ("constant_with_warmup", [0.5, 1, 1, 1]),
    ],
)
def test_a_schedule_by_the_clock_is_that_of_the_recipe(tmp_path, name, expected):
    how = TrainingArguments(tmp_path, lr_scheduler_type=name, warmup_steps=0.1, use_cpu=True)
    rates = []
    for spent in (0.05, 0.1, 0.325, 1.0):
        clock = _Deadline(time.monotonic() - spent * 1e6, 1e6)  # of 12 days: it stands still
        rates.append(_by_the_clock(how, clock)(0))
    assert rates == pytest.approx(expected, abs=1e-3)


def test_the_example_crops_and_flips_each_image_and_normalises_as_its_processor_does():
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    image = draw_image(0, (32, 32))
    transform = example.train_transform(processor)
    batch = transform({"image": [image] * 8, "label": [3] * 8})
    collated = example.collate(
        [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    )
    assert collated["pixel_values"].shape == (8, 3, 16, 16)
    assert collated["labels"].tolist() == [3] * 8
    assert len({pixels.numpy().tobytes() for pixels in collated["pixel_values"]}) == 8
    whole = example.test_transform(processor)({"image": [image], "label": [3]})
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(whole["pixel_values"][0], expected)


def test_the_examples_crop_covers_8_to_100_percent_of_the_image():
    # Each pixel holds its own column and row: how far they reach tells the crop's size.
    ramp = np.tile(np.arange(200, dtype=np.uint8), (200, 1))
    across, down = Image.fromarray(ramp), Image.fromarray(ramp.T.copy())
    image = Image.merge("RGB", [across, down, across])
    shares = []
    for _ in range(300):
        crop = np.asarray(example.random_crop(image, (64, 64))).astype(int)
        width, height = np.ptp(crop[..., 0]), np.ptp(crop[..., 1])
        shares.append(width * height / 200**2)
    assert 0.05 < min(shares) < 0.2
    assert 0.7 < max(shares) <= 1
