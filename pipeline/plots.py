"""Every figure, drawn from plain values and written as PNG."""

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL.Image import Image

# Told apart by colour-blind readers (Okabe and Ito).
BLUE, ORANGE = "#0072b2", "#d55e00"
OKABE_ITO = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00")
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


def attention_panels(
    panels: list[tuple[str, Image]], title: str, path: Path, colors: Colormap
) -> None:
    """Overlays side by side, at most six in a row, with what the colours mean."""
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
    """One row of overlays an image; its first caption is the answer."""
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
    """Mean deletion and insertion curves of each method, random order dashed."""
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
        verb = "greyed out" if kind == "deletion" else "shown"
        axis.set(title=f"{kind.capitalize()}, {hint}", xlabel=f"patches {verb}, %", ylim=(0, 1))
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("probability of the predicted class")
    axes[1].legend(frameon=False)
    _save(figure, path)


def benchmark(rows: dict[str, dict], path: Path) -> None:
    """How many times better ours is than the other side, plain and tuned, and the target.

    `rows` are those of `benchmarks.json`. Without a pair to compare, nothing is drawn.
    """
    pairs = [(pair, row["hardware"]) for row in rows.values() for pair in row["pairs"]]
    shown = [found for found in pairs if found[0]["times"]][::-1]  # from the bottom up
    if not shown:
        return
    one_machine = len({hardware for _, hardware in pairs}) == 1
    figure, axes = plt.subplots(figsize=(9, 0.62 * len(shown) + 1.3))
    names = []
    for row, (pair, hardware) in enumerate(shown):
        name = pair["what"].replace("`", "")
        names.append(name if one_machine else f"{name}, {hardware}")
        for side, lift, color in (("times", 0.18, BLUE), ("times_tuned", -0.18, ORANGE)):
            target = pair["target" + side.removeprefix("times")]
            if target:
                axes.plot([target] * 2, [row + lift - 0.2, row + lift + 0.2], color="black")
            if pair[side]:
                axes.barh(row + lift, pair[side] - 1, 0.34, left=1, color=color)
                axes.annotate(
                    f"{pair[side]:.3g}x", (max(pair[side], 1), row + lift), va="center",
                    xytext=(5, 0), textcoords="offset points", fontsize="small",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                )  # fmt: skip
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(shown)), [textwrap.fill(n, 36) for n in names], fontsize="small")
    axes.set_xscale("log")
    axes.set_xlim(right=2 * max(pair["times"] for pair, _ in shown))
    axes.xaxis.set_major_formatter("{x:g}x")
    hardware = f", {pairs[0][1]}" if one_machine else ""
    axes.set(title=f"How many times better than the example script{hardware}")
    marks = [Patch(color=BLUE, label="as it comes"), Patch(color=ORANGE, label="tuned")]
    marks.append(Line2D([], [], color="black", marker="|", linestyle="none", label="target"))
    axes.legend(handles=marks, frameon=False, loc="lower right")
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
