"""The benchmark's arithmetic, its example side and, marked slow, all of its rows."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainingArguments, default_data_collator
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from benchmarks import __main__ as benchmarks
from benchmarks import example, machine, report, rows
from pipeline.errors import UserError
from samples import draw_image, run_script

ABOUT = {
    "gflops": {"float32": 123.4, "bfloat16": 0.3},
    "hardware": "another machine",
    "versions": {"torch": "1.0"},
    "dataset": "digits",
    "measured": "2026-01-01",
    "note": "As before.",
}
SPEED = {
    "name": "Train",
    "unit": "images/s",
    "share": 0.63,
    "ours": rows.summarize([9, 25, 50]),
    "example": rows.summarize([1, 100, 10]),
}


def run_benchmarks(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks", *args]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_the_quick_benchmark_measures_every_row(here):
    result = run_benchmarks("--quick")
    assert result.returncode == 0, result.stderr[-2000:]
    results = json.loads((here / "results/benchmarks_quick.json").read_text())
    assert list(results) == list(rows.ROWS)
    for row in results.values():
        assert row["versions"]["torch"] == torch.__version__
        assert row["gflops"]["float32"] > row["gflops"]["bfloat16"] / 100 > 0
        for comparison in row["comparisons"]:
            sides = [
                comparison[side] for side in ("ours", "example", "tuned") if side in comparison
            ]
            assert all(0 <= s["low"] <= s["value"] <= s["high"] for s in sides), comparison
            assert f"| {comparison['name']}, {comparison['unit']} |" in result.stdout
    pairs = [c for row in results.values() for c in row["comparisons"] if "example" in c]
    assert len(pairs) == 6
    # Not of the data, not of an error, and not in int8, whose limit is not measured.
    in_int8 = sum("int8" in c["name"] for c in pairs)
    assert sum(bool(c.get("share")) for c in pairs) == 4 - in_int8
    with Image.open(here / "results/benchmarks_quick.png") as figure:
        assert len(figure.convert("L").getcolors(256)) > 20  # something is drawn


@pytest.mark.slow
def test_a_row_measured_again_leaves_the_others(here):
    kept = ABOUT | {"comparisons": [SPEED]}
    (here / "results").mkdir()
    file = here / "results/benchmarks_quick.json"
    file.write_text(json.dumps({"training": kept}))
    result = run_benchmarks("--quick", "--rows", "prepare-data")
    assert result.returncode == 0, result.stderr[-2000:]
    results = json.loads(file.read_text())
    assert results["training"] == kept
    assert results["prepare-data"]["comparisons"][0]["ours"]["value"] > 0
    assert "another machine, digits, 2026-01-01" in result.stdout


def test_a_wrong_row_is_named(here, monkeypatch):
    with pytest.raises(UserError, match="There is no row") as error:
        run_script(monkeypatch, benchmarks.main, "--rows", "train")
    assert str(error.value).startswith('There is no row "train"; choose from prepare-data,')
    assert "\n" not in str(error.value)


def test_the_help_names_every_row(here):
    words = run_benchmarks("--help").stdout.replace("-\n", "-")
    assert all(row in words for row in rows.ROWS)


@pytest.mark.parametrize(("unit", "times"), [("images/s", 2.5), ("ms", 0.4), ("%", 0.4)])
def test_sides_are_compared_by_their_medians(unit, times):
    assert SPEED["ours"] == {"value": 25, "low": 9, "high": 50, "runs": 3}
    assert report.ratio(SPEED | {"unit": unit}, "example") == pytest.approx(times)
    assert report.ratio(SPEED | {"unit": unit}, "tuned") is None


def test_a_table_shows_the_limit_its_share_and_the_ratio():
    text = report.as_table({"training": ABOUT | {"comparisons": [SPEED]}})
    line = "| Train, images/s | 123 / 0.3 | 25 (9 to 50) | 63% | 10 (1 to 100) | 2.5x |  |  |"
    assert line in text
    assert text.startswith("another machine, digits, 2026-01-01, torch 1.0\n")
    assert text.endswith("- Train: As before.")


def test_the_operations_of_vit_base_are_the_published_ones(here):
    gflop = machine.gflop_per_image(rows.save_vit(224), 224)
    assert gflop == pytest.approx(2 * 17.6, rel=0.01)  # 17.6 G multiply-adds


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", [0.5, 1, (1 + 0.5**0.5) / 2, 0]),
        ("linear", [0.5, 1, 0.75, 0]),
        ("constant_with_warmup", [0.5, 1, 1, 1]),
    ],
)
def test_a_schedule_over_time_is_that_over_steps(tmp_path, name, expected):
    args = TrainingArguments(tmp_path, lr_scheduler_type=name, warmup_steps=0.1, use_cpu=True)
    rates = []
    for share in (0.05, 0.1, 0.325, 1.0):
        trainer = SimpleNamespace(args=args, progress=lambda share=share: share)
        rates.append(rows.learning_rate(trainer)(0))
    assert rates == pytest.approx(expected, abs=1e-3)


def test_steps_at_a_larger_size_take_more_of_the_time(here):
    model, shares = rows.save_vit(98), []
    for share in (0, 0.2, 0.5, 1):
        clock = rows.Clock(1e6)  # 12 days: it stands still
        clock.times[0] -= share * 1e6
        shares.append(clock.share_of_steps(model, {"0": 56, "0.5": 98}))
    low, high = machine.gflop_per_image(model, 56), machine.gflop_per_image(model, 98)
    assert 2 * low < high
    first = low / (low + high)  # of the time
    expected = [0, 0.2 / first * 0.5, 0.5 + 0.5 * (0.5 - first) / (1 - first), 1]
    assert shares == pytest.approx(expected, abs=1e-3)


def test_the_example_crops_flips_and_normalizes_each_image_as_its_processor_does():
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    image = draw_image(0, (32, 32))
    batch = example.transform(processor)({"image": [image] * 8, "label": [3] * 8})
    columns = zip(*batch.values(), strict=True)
    collated = default_data_collator([dict(zip(batch, row, strict=True)) for row in columns])
    assert collated["pixel_values"].shape == (8, 3, 16, 16)
    assert collated["labels"].tolist() == [3] * 8
    assert len({pixels.numpy().tobytes() for pixels in collated["pixel_values"]}) == 8
    whole = example.transform(processor, augment=False)({"image": [image], "label": [3]})
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
