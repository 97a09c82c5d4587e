"""Render the results as a Markdown table and as a figure."""

from pathlib import Path

from pipeline.plots import BLUE, ORANGE, plt

HEAD = """
| | GFLOP/s, float32 / bfloat16 | This pipeline | % of peak | Example | | Tuned example | |
|:--|--:|--:|--:|--:|--:|--:|--:|"""


def ratio(comparison: dict, side: str) -> float | None:
    """Return how many times better this pipeline is than a side; None without a comparison."""
    ours, other = comparison["ours"]["value"], comparison.get(side, {}).get("value")
    if ours and other:
        return other / ours if comparison["unit"] in ("ms", "%") else ours / other


def as_table(results: dict[str, dict]) -> str:
    """Return a table for each machine, dataset and date, with notes on the comparisons."""
    tables = {}
    for row in results.values():
        details = [f"{name} {version}" for name, version in row["versions"].items()]
        title = ", ".join([row["hardware"], row["dataset"], row["measured"], *details])
        lines, notes = tables.setdefault(title, ([title, HEAD], [""]))
        lines += [_line(row, comparison) for comparison in row["comparisons"]]
        notes.append(f"- {row['comparisons'][0]['name']}: {row['note']}")
    return "\n\n".join("\n".join(lines + notes) for lines, notes in tables.values())


def _line(row: dict, comparison: dict) -> str:
    limits = " / ".join(_number(rate) for rate in row["gflops"].values())
    share = f"{comparison['share']:.0%}" if comparison.get("share") else ""
    name = f"{comparison['name']}, {comparison['unit']}"
    cells = [name, limits, _cell(comparison["ours"]), share]
    for side in ("example", "tuned"):
        times = ratio(comparison, side)
        cells += [_cell(comparison.get(side)), f"{times:.3g}x" if times else ""]
    return f"| {' | '.join(cells)} |"


def _cell(summary: dict | None) -> str:
    value, low, high = (_number((summary or {}).get(key)) for key in ("value", "low", "high"))
    return value if low == high else f"{value} ({low} to {high})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(results: dict[str, dict], path: Path) -> None:
    """Draw how many times better this pipeline is than the example, for comparable rows."""
    rows = [c for row in results.values() for c in row["comparisons"] if ratio(c, "example")][::-1]
    figure, axes = plt.subplots(figsize=(9, 0.6 * len(rows) + 1.5))
    for side, color, shift in (("example", BLUE, 0.19), ("tuned", ORANGE, -0.19)):
        for i, times in enumerate(ratio(row, side) for row in rows):
            bars = axes.barh(i + shift, (times or 1) - 1, 0.36, left=1, color=color)
            axes.bar_label(bars, [f"{times:.3g}x" if times else ""], padding=4)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    machines = " and ".join({row["hardware"]: None for row in results.values()})
    figure.suptitle(f"How many times better than transformers' example, {machines}")
    axes.set(xscale="log", xmargin=0.15)
    axes.axvline(1, color="black", linewidth=1)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.legend(axes.containers[:: max(len(rows), 1)], ["example", "tuned example"], frameon=False)
    figure.savefig(path)
