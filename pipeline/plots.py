"""Every figure, drawn from plain values and saved as PNG."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap
from matplotlib.font_manager import fontManager
from PIL.Image import Image

# Distinct for color-blind readers (Okabe and Ito).
BLUE, ORANGE = "#0072b2", "#d55e00"
MAX_CLASSES = 50  # that a confusion matrix stays readable with
MAX_PAIRS = 30
# Fonts with the characters that matplotlib's own lacks, where one is installed.
FALLBACK_FONTS = ("Noto Sans CJK SC", "WenQuanYi Zen Hei", "Hiragino Sans GB", "Microsoft YaHei")
OKABE_ITO = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00")
plt.rcParams |= {
    "font.family": ["DejaVu Sans", *({f.name for f in fontManager.ttflist} & {*FALLBACK_FONTS})],
    "text.parse_math": False,  # a $ in a class name is a $
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
}


def training_curves(log: list[dict], path: Path) -> bool:
    """Draw the loss of training and validation, and the validation accuracy, over epochs.

    Args:
        log: The `Trainer`'s log history.
        path: The PNG file.

    Returns:
        Whether there was anything to draw.
    """
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
            f"{accuracies[best]:.2%}",
            (epochs[best], 100 * accuracies[best]),
            xytext=(0, -14),
            textcoords="offset points",
            ha="center",
        )
    left.set(xlabel="epoch", ylabel="cross-entropy", title="Loss", ylim=(0, None))
    left.legend(frameon=False)
    right.set(xlabel="epoch", ylabel="%", title="Validation accuracy")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    _save(figure, path)
    return True


def confusion_matrix(matrix: list[list[int]], labels: list[str], path: Path) -> None:
    """Draw counts (C, C), rows true and columns predicted; shaded by the share of the row.

    Above MAX_CLASSES classes the most confused pairs are drawn instead.
    """
    counts = np.asarray(matrix)
    if len(labels) > MAX_CLASSES:
        return _confused_pairs(counts, labels, path)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(4.0, 0.55 * len(labels) + 1.5)
    figure, axes = plt.subplots(figsize=(side, side))
    # A cube root makes the few errors visible beside the many correct answers.
    axes.imshow(np.cbrt(shares), cmap="Blues", vmin=0, vmax=1.15)
    if len(labels) <= 30:
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.3 else "black"
            axes.text(
                column, row, counts[row, column], ha="center", va="center", color=color,
                fontsize="small", fontweight="bold" if row == column else None,
            )  # fmt: skip
    ticks = range(len(labels))
    axes.set_xticks(ticks, labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, labels)
    axes.set(xlabel="predicted", ylabel="true", title="Images by true and predicted class")
    axes.spines[:].set_visible(False)
    _save(figure, path)


def _confused_pairs(counts: np.ndarray, labels: list[str], path: Path) -> None:
    errors = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    order = np.argsort(errors, axis=None)[::-1][:MAX_PAIRS]
    pairs = [pair for pair in zip(*np.unravel_index(order, errors.shape), strict=True)][::-1]
    names = [f"{labels[true]} taken for {labels[predicted]}" for true, predicted in pairs]
    figure, axes = plt.subplots(figsize=(8, 0.25 * MAX_PAIRS + 1))
    axes.barh(range(len(pairs)), [errors[pair] for pair in pairs], color=BLUE)
    axes.set_yticks(range(len(pairs)), names, fontsize="small")
    axes.set(
        xlabel="images", title=f"The {len(pairs)} most confused pairs of {len(labels)} classes"
    )
    _save(figure, path)


def attention_panels(
    panels: list[tuple[str, Image]], title: str, path: Path, colors: Colormap
) -> None:
    """Draw captioned overlays side by side, at most six in a row, with a color bar."""
    columns = min(len(panels), 6)
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(1.9 * columns + 0.9, 2.1 * rows + 0.5), squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, (caption, image) in zip(grid.flat, panels, strict=False):
        axes.imshow(image)
        axes.set_title(caption, fontsize="small")
    figure.suptitle(title.replace("\n", ", "), fontsize="medium")
    _color_bar(figure, grid, colors)
    _save(figure, path)


def attention_sheet(rows: list[list[tuple[str, Image]]], path: Path, colors: Colormap) -> None:
    """Draw one row of captioned overlays per image; the first caption is the answer."""
    columns = len(rows[0])
    figure, grid = plt.subplots(
        len(rows), columns, figsize=(1.8 * columns + 0.9, 2.1 * len(rows)), squeeze=False
    )
    for line, row in zip(grid, rows, strict=True):
        for axes, (caption, image) in zip(line, row, strict=True):
            axes.imshow(image)
            axes.axis("off")
            axes.set_title(caption, fontsize="x-small")
    _color_bar(figure, grid, colors)
    _save(figure, path)


def faithfulness_curves(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw the mean deletion and insertion curves of each method, random order dashed."""
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
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("probability of the predicted class")
    axes[1].legend(frameon=False)
    _save(figure, path)


def _color_bar(figure, axes, colors: Colormap) -> None:
    shrink = min(0.8, 3 / figure.get_figheight())  # at most 3 inches high
    bar = figure.colorbar(ScalarMappable(cmap=colors), ax=axes, shrink=shrink, anchor=(0, 1))
    bar.set_ticks([0, 1], labels=["least\nattention", "most\nattention"], fontsize="x-small")
    bar.outline.set_visible(False)


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
