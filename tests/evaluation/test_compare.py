import json
import shutil

import numpy as np
import pytest
from scipy.stats import bootstrap

import compare as script
from pipeline import runs
from pipeline.errors import UserError
from pipeline.evaluation.compare import average, compare
from samples import run_script

DATASET = {"name": "pets", "config": None, "revision": None, "split": "test"}
DATASET |= {"published_split": "test"}


def results(predictions: np.ndarray, labels: np.ndarray) -> dict:
    """What `compare` reads of an evaluation, of two classes."""
    return {
        "labels": ["cat", "dog"],
        "support": np.bincount(labels).tolist(),
        "dataset": DATASET | {"images": len(labels)},
        "predictions": predictions.tolist(),
        "accuracy": float((predictions == labels).mean()),
    }


def test_mcnemars_test_and_the_bootstrap_of_a_worked_example():
    # Of 100 images, 6 only the first gets right and 1 only the second: p = 2 * (1 + 7) / 2**7.
    labels = np.array([0] * 50 + [1] * 50)
    first, second = labels.copy(), labels.copy()
    second[[0, 1, 2, 3, 60, 61]] ^= 1
    first[[4, 70]] ^= 1
    second[70] ^= 1  # wrong in both
    report = compare(results(first, labels), results(second, labels), labels)
    assert (report["only_first"], report["only_second"]) == (6, 1)
    assert report["p_value"] == pytest.approx(0.125)
    assert not report["different"]
    assert report["difference"] == pytest.approx(-0.05)
    assert report["by_class"] == {
        "cat": {"only_first": 4, "only_second": 1},
        "dog": {"only_first": 2, "only_second": 0},
    }
    assert report["rows"] == [0, 1, 2, 3, 4, 60, 61]
    right = [(x == labels).astype(float) for x in (second, first)]
    expected = bootstrap(
        right, lambda a, b, axis: a.mean(axis) - b.mean(axis), paired=True, vectorized=True,
        method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert report["difference_interval"] == pytest.approx(list(expected), abs=0.011)


def test_runs_are_called_different_at_the_stated_rate():
    generator = np.random.default_rng(0)
    labels = np.zeros(400, int)
    labels[200:] = 1
    verdicts = {0.0: [], 0.06: []}
    for gap, different in verdicts.items():
        for _ in range(60):
            wrong = [generator.random(400) < rate for rate in (0.1, 0.1 + gap)]
            pair = [results(labels ^ w, labels) for w in wrong]
            different.append(compare(*pair, labels)["different"])
    assert np.mean(verdicts[0.0]) <= 0.1
    assert np.mean(verdicts[0.06]) >= 0.5


def test_runs_on_other_images_are_refused():
    labels = np.array([0, 1, 1])
    first = results(labels, labels)
    with pytest.raises(UserError, match="not evaluated on the same images"):
        compare(first, results(labels, np.array([0, 0, 1])), labels)
    for change in ({"published_split": "val"}, {"config": "small"}, {"revision": "main"}):
        with pytest.raises(UserError, match="not evaluated on the same images"):
            compare(first, first | {"dataset": first["dataset"] | change}, labels)


def test_seeds_are_averaged_with_students_interval():
    seeds = [
        {"recipe": {"seed": seed, "model": "vit"}, "dataset": DATASET, "accuracy": value}
        | {"macro_f1": value, "nll": 0.3, "ece": 0.01}
        for seed, value in ((1, 0.90), (2, 0.92), (3, 0.94))
    ]
    table = average(seeds)
    assert table["seeds"] == [1, 2, 3]
    added = {"recipe": {"seed": 3, "model": "vit", "calibrate": False}}  # a key with its default
    assert average([seeds[0], seeds[2] | added])["seeds"] == [1, 3]
    assert table["accuracy"]["mean"] == pytest.approx(0.92)
    reach = 4.30265 * 0.02 / 3**0.5  # the quantile of Student's t with two degrees of freedom
    assert table["accuracy"]["interval"] == pytest.approx([0.92 - reach, 0.92 + reach], abs=1e-6)
    assert table["nll"]["interval"] == pytest.approx([0.3, 0.3])
    with pytest.raises(UserError, match="at least two seeds"):
        average([{}])
    with pytest.raises(UserError, match="The seeds are 1, 1: average runs with different seeds"):
        average([seeds[0], seeds[0]])
    for change in ({"recipe": {"seed": 4, "model": "dinov2"}}, {"recipe": None}):
        with pytest.raises(UserError, match="differ by more than their seed"):
            average([seeds[0], seeds[1] | change])
    with pytest.raises(UserError, match="differ by more than their seed"):
        average([seeds[0], seeds[1] | {"dataset": DATASET | {"split": "validation"}}])


@pytest.mark.slow
def test_the_script_compares_runs_and_averages_seeds(measured, monkeypatch, capsys):
    shutil.copytree("models/tiny", "models/other")
    other = runs.read_json(measured / "results/tiny/evaluation_results.json")
    other["recipe"]["seed"] = 7
    other["predictions"][:5] = [(p + 1) % 10 for p in other["predictions"][:5]]
    runs.write_json(measured / "results/other/evaluation_results.json", other)

    run_script(monkeypatch, script.main, "tiny", "models/other")
    text = capsys.readouterr().out
    report = json.loads((measured / "results/compare/tiny_other/comparison.json").read_text())
    assert f"p = {report['p_value']:.2g}" in text
    assert report["images"] == 360
    assert report["rows"] == [row for row in report["rows"] if row < 5]
    run_script(monkeypatch, script.main, "tiny", "other", "--seeds")
    for name in ("tiny", "other"):
        table = runs.read_json(measured / f"results/{name}/evaluation_results.json")["seeds"]
        assert table["accuracy"]["mean"] == pytest.approx(other["accuracy"])
    with pytest.raises(UserError, match="have one results folder"):
        run_script(monkeypatch, script.main, "tiny", "models/tiny")
    (measured / "models/tiny/config.json").write_text("{}")
    with pytest.raises(UserError, match="tiny was trained again"):
        run_script(monkeypatch, script.main, "tiny", "other")
