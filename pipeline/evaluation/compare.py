"""Compare two runs on the same test images, and average several seeds of one recipe.

- McNemar's exact test (McNemar 1947): among images that only one of two models classifies
  correctly, does each model get half of them right?
- Paired bootstrap (Efron & Tibshirani 1993): images are resampled with both models' predictions.
"""

from dataclasses import replace

import numpy as np
from datasets import Dataset, Image
from scipy.stats import binomtest, t

from pipeline.data.loading import load_raw
from pipeline.data.splits import class_numbers
from pipeline.errors import UserError, shorten
from pipeline.recipe import RECIPE_DEFAULTS, data_arguments

DRAWS = 10_000
SEED = 42  # the default of TrainingArguments
AVERAGED = ("accuracy", "macro_f1", "nll", "ece")


def compare(first: dict, second: dict, labels: np.ndarray) -> dict:
    """Compare the results of two evaluations.

    Args:
        first: Results of `evaluate`.
        second: Results for the same images; UserError if they are for others.
        labels: The true class numbers (N,).

    Returns:
        The `difference` in accuracy, second minus first, with its 95 % interval; the `p_value` of
        McNemar's test, and whether the models are `different` at 5 %; how many images only one
        model gets right, in total and by class, and the `rows` of those images.
    """
    if first["labels"] != second["labels"] or first["support"] != second["support"] or any(
        first["dataset"][key] != second["dataset"][key]
        for key in ("name", "config", "revision", "split", "published_split", "images")
    ):  # fmt: skip
        raise UserError("The runs were not evaluated on the same images: evaluate both again.")
    correct = [np.asarray(results["predictions"]) == labels for results in (first, second)]
    change = correct[1].astype(int) - correct[0]  # (N,): 1 where only the second is right
    count, lost, won = len(change), int((change < 0).sum()), int((change > 0).sum())
    shares = [lost / count, won / count, 1 - (lost + won) / count]
    draws = np.random.default_rng(0).multinomial(count, shares, DRAWS)  # the paired bootstrap
    interval = np.quantile((draws[:, 1] - draws[:, 0]) / count, [0.025, 0.975])
    p_value = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    by_class = {}
    for i, name in enumerate(first["labels"]):
        part = change[labels == i]
        by_class[name] = {"only_first": int((part < 0).sum()), "only_second": int((part > 0).sum())}
    return {
        "accuracy": [first["accuracy"], second["accuracy"]],
        "difference": float(change.mean()),
        "difference_interval": interval.tolist(),
        "p_value": p_value,
        "different": p_value < 0.05,
        "only_first": lost,
        "only_second": won,
        "images": count,
        "by_class": by_class,
        "rows": np.flatnonzero(change).tolist(),
    }


def load_evaluated(results: dict) -> tuple[Dataset, np.ndarray]:
    """Load the split that a run was evaluated on, undecoded, and its class numbers (N,)."""
    info = results["dataset"]
    data = data_arguments(results["model"]["name"], info["name"])
    data = replace(data, dataset_config=info["config"], dataset_revision=info["revision"])
    split = load_raw(data)[info["split"]]
    names = split.features["label"].names
    labels = np.array([results["labels"].index(name) for name in names])[class_numbers(split)]
    if np.bincount(labels, minlength=len(results["labels"])).tolist() != results["support"]:
        raise UserError(f'The {info["split"]} images of "{info["name"]}" changed: evaluate again.')
    return split.cast_column("image", Image(decode=False)), labels


def average(runs: list[dict]) -> dict:
    """Average the results of several seeds: mean, 95 % Student's t interval, and values."""
    if len(runs) < 2:
        raise UserError("An interval needs at least two seeds: set N=3, for example.")
    recipes = [RECIPE_DEFAULTS | (results["recipe"] or {}) for results in runs]
    seeds = [recipe.pop("seed", SEED) for recipe in recipes]
    sources = [
        {k: results["dataset"][k] for k in ("name", "revision", "split")} for results in runs
    ]
    if len({*seeds}) < len(seeds):
        raise UserError(f"The seeds are {shorten(seeds)}: average runs with different seeds.")
    if any(recipe != recipes[0] for recipe in recipes) or any(s != sources[0] for s in sources):
        raise UserError("The runs differ by more than their seed: average runs of one recipe.")
    table = {}
    for key in AVERAGED:
        values = [results[key] for results in runs]
        mean, error = np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5
        interval = [mean, mean] if error == 0 else t.interval(0.95, len(values) - 1, mean, error)
        table[key] = {"mean": float(mean), "interval": [*map(float, interval)], "values": values}
    return {"seeds": seeds, **table}
