"""Every figure, drawn from plain values and written as PNG."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt
import numpy as np

BLUE, ORANGE = "#0072b2", "#d55e00"  # told apart by colour-blind readers (Okabe and Ito)
plt.rcParams |= {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
}


def training_curves(log: list[dict], path: Path) -> None:
    """Loss of training and validation, and validation accuracy, over epochs.

    `log` is the `Trainer`'s log history.
    """
    train = [(e["epoch"], e["loss"]) for e in log if "loss" in e]
    validation = [(e["epoch"], e["eval_nll"], e["eval_accuracy"]) for e in log if "eval_nll" in e]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    left.plot(*zip(*train, strict=True), color=BLUE, linewidth=1, label="training (augmented)")
    epochs, losses, accuracies = zip(*validation, strict=True)
    left.plot(epochs, losses, "o-", color=ORANGE, markersize=4, label="validation")
    left.set(xlabel="epoch", ylabel="cross-entropy", title="Loss", ylim=(0, None))
    left.legend(frameon=False)
    right.plot(epochs, [100 * a for a in accuracies], "o-", color=ORANGE, markersize=4)
    best = int(np.argmax(accuracies))
    right.annotate(
        f"{accuracies[best]:.2%}",
        (epochs[best], 100 * accuracies[best]),
        xytext=(0, -14),
        textcoords="offset points",
        ha="center",
    )
    right.set(xlabel="epoch", ylabel="%", title="Validation accuracy")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    _save(figure, path)


def confusion_matrix(matrix: list[list[int]], labels: list[str], path: Path) -> None:
    """Counts (C, C), rows true and columns predicted; shaded by the share of the row."""
    counts = np.asarray(matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(4.0, 0.55 * len(labels) + 1.5)
    figure, axes = plt.subplots(figsize=(side, side))
    # A cube root shows the few mistakes beside the many right answers.
    axes.imshow(np.cbrt(shares), cmap="Blues", vmin=0, vmax=1.15)
    if len(labels) <= 30:
        for row, column in np.ndindex(*counts.shape):
            if counts[row, column]:
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


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
