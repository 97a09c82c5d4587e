"""Draw all figures from plain values and save them as PNG."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap
from matplotlib.font_manager import fontManager
from PIL.Image import Image

# Colors that color-blind readers can distinguish (Okabe and Ito).
BLUE, ORANGE = "#0072b2", "#d55e00"
MAX_CLASSES = 50  # for a readable confusion matrix
MAX_PAIRS = 30
# Fonts with characters that matplotlib's default font lacks, used if installed.
FALLBACK_FONTS = ("Noto Sans CJK SC", "WenQuanYi Zen Hei", "Hiragino Sans GB", "Microsoft YaHei")
OKABE_ITO = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00")
plt.rcParams |= {
    "font.family": ["DejaVu Sans", *({f.name for f in fontManager.ttflist} & {*FALLBACK_FONTS})],
    "text.parse_math": False,  # show a $ in a class name as is
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "grid.alpha": 0.25,
}


def evaluation_figures(results: dict, log: list[dict], folder: Path) -> list[str]:
    """Draw the figures for evaluation results and a training log; return the file names."""
    confusion_matrix(
        results["confusion_matrix"], results["labels"], folder / "confusion_matrix.png"
    )
    if results["calibration"]:
        bins = {key: results["calibration"][key]["bins"] for key in ("before", "after")}
        reliability_diagram(bins, folder / "reliability.png")
    if results["robustness"]:
        corruption_heatmap(results["robustness"]["accuracy"], folder / "robustness.png")
    has_curves = training_curves(log, folder / "training_curves.png")
    drawn = {"reliability": results["calibration"], "robustness": results["robustness"]}
    drawn |= {"confusion_matrix": True, "training_curves": has_curves}
    return [f"{name}.png" for name, is_drawn in drawn.items() if is_drawn]


def training_curves(log: list[dict], path: Path) -> bool:
    """Draw loss and validation accuracy over epochs; return False if the log has neither."""
    train = [(e["epoch"], e["loss"]) for e in log if "loss" in e]
    validation = [(e["epoch"], e["eval_nll"], e["eval_accuracy"]) for e in log if "eval_nll" in e]
    if not train and not validation:
        return False
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    if train:
        left.plot(*zip(*train, strict=True), color=BLUE, linewidth=1, label="training (augmented)")
    if validation:
        epochs, losses, accuracies = zip(*validation, strict=True)
        left.plot(epochs, losses, "o-", color=ORANGE, markersize=4, label="validation")
        right.plot(epochs, [100 * a for a in accuracies], "o-", color=ORANGE, markersize=4)
        best = int(np.argmax(accuracies))
        right.annotate(
            f"{accuracies[best]:.2%}", (epochs[best], 100 * accuracies[best]), xytext=(0, -14),
            textcoords="offset points", ha="center",
        )  # fmt: skip
    left.set(xlabel="epoch", ylabel="cross-entropy", title="Loss", ylim=(0, None))
    left.legend(frameon=False)
    right.set(xlabel="epoch", ylabel="%", title="Validation accuracy")
    left.grid()
    right.grid()
    _save(figure, path)
    return True


def confusion_matrix(matrix: list[list[int]], labels: list[str], path: Path) -> None:
    """Draw counts (C, C), with true classes in rows, shaded by the share of the row.

    With more than MAX_CLASSES classes, draw the most confused pairs instead.
    """
    counts = np.asarray(matrix)
    if len(labels) > MAX_CLASSES:
        return _confused_pairs(counts, labels, path)
    # The cube root makes the few errors visible next to the many correct predictions.
    shares = np.cbrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    texts = [[str(n) if n and len(labels) <= 30 else "" for n in row] for row in counts]
    figure, axes = _matrix(shares, texts, labels, labels)
    axes.set(xlabel="predicted", ylabel="true", title="Images by true and predicted class")
    _save(figure, path)


def corruption_heatmap(accuracy: dict[str, list[float]], path: Path) -> None:
    """Draw accuracy by corruption and severity."""
    rows = list(accuracy.values())
    texts = [[f"{100 * value:.1f}" for value in row] for row in rows]
    names = [name.replace("_", " ") for name in accuracy]
    figure, axes = _matrix(np.asarray(rows), texts, names, range(1, len(rows[0]) + 1))
    axes.set(xlabel="severity", title="Accuracy under corruptions, %")
    _save(figure, path)


def reliability_diagram(bins: dict[str, list[list[float]]], path: Path) -> None:
    """Draw accuracy over confidence from named bins (3, B): size, confidence and accuracy."""
    figure, axes = plt.subplots(figsize=(4.2, 4))
    axes.plot([0, 1], [0, 1], "--", color="black", linewidth=1, label="calibrated")
    for (name, values), color in zip(bins.items(), OKABE_ITO, strict=False):
        counts, confidence, accuracy = np.asarray(values)[:, np.asarray(values)[0] > 0]
        axes.plot(confidence, accuracy, color=color, label=name)
        axes.scatter(confidence, accuracy, 3 + 100 * counts / counts.sum(), color=color)
    axes.set(xlabel="confidence", ylabel="accuracy", title="Reliability (point area: images)")
    axes.legend(frameon=False)
    axes.grid()
    _save(figure, path)


def image_sheet(
    images: list[tuple[str, Image]], columns: int, path: Path, colors: Colormap | None = None,
    title: str = "",
) -> None:  # fmt: skip
    """Draw captioned images in rows, with an attention color bar if `colors` is given."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(1.8 * columns + 0.9, 2.1 * rows + 0.4), squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, (caption, image) in zip(grid.flat, images, strict=False):
        axes.imshow(image)
        axes.set_title(caption, fontsize="small", y=1)  # y: skip automatic placement
    figure.suptitle(title.replace("\n", ", "), fontsize="medium")
    if colors:
        shrink = min(0.8, 3 / figure.get_figheight())  # at most 3 inches high
        bar = figure.colorbar(ScalarMappable(cmap=colors), ax=grid, shrink=shrink, anchor=(0, 1))
        bar.set_ticks([0, 1], labels=["least\nattention", "most\nattention"], fontsize="x-small")
        bar.outline.set_visible(False)
    _save(figure, path)


def faithfulness_curves(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw the mean deletion and insertion curves of each method; random order is dashed."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    better = {"deletion": "lower is better", "insertion": "higher is better"}
    for axis, (kind, hint) in zip(axes, better.items(), strict=True):
        for (method, kinds), color in zip(curves.items(), OKABE_ITO, strict=False):
            share = np.linspace(0, 100, len(kinds[kind]))
            plain = method == "random"
            axis.plot(
                share, kinds[kind], "--" if plain else "-", label=method,
                color="black" if plain else color,
            )  # fmt: skip
        verb = "masked" if kind == "deletion" else "shown"
        axis.set(title=f"{kind.capitalize()}, {hint}", xlabel=f"patches {verb}, %", ylim=(0, 1))
        axis.grid()
    axes[0].set_ylabel("probability of the predicted class")
    axes[1].legend(frameon=False)
    _save(figure, path)


def _matrix(shades: np.ndarray, texts: list[list[str]], rows, columns):
    sides = (max(4.0, 0.55 * len(names) + 1.5) for names in (columns, rows))
    figure, axes = plt.subplots(figsize=tuple(sides))
    axes.imshow(shades, cmap="Blues", vmin=0, vmax=1.15)
    for row, column in np.ndindex(shades.shape):
        color = "white" if shades[row, column] > 0.67 else "black"
        weight = "bold" if rows is columns and row == column else None
        axes.text(
            column, row, texts[row][column], ha="center", va="center", color=color,
            fontsize="small", fontweight=weight,
        )  # fmt: skip
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.spines[:].set_visible(False)
    return figure, axes


def _confused_pairs(counts: np.ndarray, labels: list[str], path: Path) -> None:
    errors = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    order = np.argsort(errors, axis=None)[::-1][:MAX_PAIRS]
    pairs = zip(*np.unravel_index(order, errors.shape), strict=True)
    pairs = [pair for pair in pairs if errors[pair]][::-1]
    names = [f"{labels[true]} predicted as {labels[predicted]}" for true, predicted in pairs]
    figure, axes = plt.subplots(figsize=(8, 0.25 * MAX_PAIRS + 1))
    axes.barh(range(len(pairs)), [errors[pair] for pair in pairs], color=BLUE)
    axes.set_yticks(range(len(pairs)), names, fontsize="small")
    axes.set(xlabel="images", title=f"Most confused pairs of {len(labels)} classes")
    _save(figure, path)


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
