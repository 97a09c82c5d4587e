"""Measure this pipeline side by side with what people use instead, on this machine.

Prints a table, and writes results/benchmarks.json, with each figure's machine and versions, and
results/benchmarks.png. Rows that were measured before stay there until they are measured again.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from pipeline.errors import UserError

# In the order of the table: the rows' names, and those that want an accelerator or hours.
ROWS = {
    "preprocess": "preprocessing",
    "train-base": "training_base",
    "train-small": "training_small",
    "equal-time": "equal_time",
    "one-image": "one_image",
    "test-split": "test_split",
    "memory": "memory",
    "demo": "demo",
    "recipe": "whole_recipe",
    "fine-tune": "fine_tune",
}
LONG = ("recipe", "fine-tune")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", nargs="*", help=f"of {', '.join(ROWS)}; default: what fits here")
    parser.add_argument("--quick", action="store_true", help="all rows, small, in 3 minutes")
    parser.add_argument("--dataset", default="digits", help="images to measure on")
    parser.add_argument("--model", help="a pretrained backbone, for equal-time and fine-tune")
    parser.add_argument("--recipe", default="dinov2-small", help="of fine-tune")
    parser.add_argument("--minutes", type=float, default=30, help="of training in equal-time")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder to write to")
    arguments = parser.parse_args()
    wrong = [row for row in arguments.rows or () if row not in ROWS]
    if wrong:
        raise UserError(f'There is no row "{wrong[0]}"; choose from {", ".join(ROWS)}.')

    # After the arguments: the libraries take seconds.
    import benchmark_rows as rows
    import torch
    from transformers.utils import logging

    from pipeline import environment, figures

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    here = Path.cwd()
    chosen = arguments.rows or [
        row
        for row in ROWS
        if row not in LONG or arguments.quick or torch.accelerator.is_available()
    ]
    if arguments.quick and not arguments.rows:
        chosen.remove("demo")  # takes its minute or two whatever is asked for
    file = arguments.results.resolve() / "benchmarks.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        setting = rows.Setting(
            dataset=_absolute(arguments.dataset, here),
            backbone=arguments.model and _absolute(arguments.model, here),
            folder=Path(folder),
            quick=arguments.quick,
            seconds=6 if arguments.quick else 60 * arguments.minutes,
            recipe=arguments.recipe,
        )
        about = {
            "hardware": environment.hardware(),
            "dataset": arguments.dataset,
            "quick": arguments.quick,
            "versions": environment.versions(),
            "code_revision": environment.code_revision(),
        }
        for row in chosen:
            started = time.monotonic()
            print(f"{row} …", flush=True)
            with contextlib.redirect_stderr(io.StringIO()):  # bars of every map and split
                pairs = [summary(pair) for pair in getattr(rows, ROWS[row])(setting)]
            took = {"took_s": round(time.monotonic() - started, 1)}
            found[row] = about | {"measured": time.strftime("%Y-%m-%d")} | took | {"pairs": pairs}
            file.write_text(json.dumps(found, indent=1))
    found = {row: found[row] for row in ROWS if row in found}
    pairs = [pair for row in found.values() for pair in row["pairs"]]
    figures.benchmark(pairs, file.with_suffix(".png"))
    print("\n" + table(pairs))
    print(f"\nWritten: {file}, {file.with_suffix('.png')}")


def _absolute(name: str, here: Path) -> str:
    """A folder's whole path, for the work is done in another one; a Hub id as it is."""
    path = (here / Path(name).expanduser()).resolve()
    return str(path) if path.is_dir() else name


def summary(pair) -> dict:
    """A pair with the median and spread of each side, and how many times better ours is."""
    found = asdict(pair)
    for side in ("ours", "theirs", "tuned"):
        values = found[side]
        found[side] = values and {
            "median": statistics.median(values),
            "least": min(values),
            "most": max(values),
            "runs": len(values),
        }
    for side, key in (("theirs", "times"), ("tuned", "times_tuned")):
        found[key] = found[side] and _times(found["ours"], found[side], pair.less_is_better)
    found["met"] = _met(found)
    return found


def _times(ours: dict, other: dict, less_is_better: bool) -> float:
    times = ours["median"] / other["median"]
    return 1 / times if less_is_better else times


def _met(pair: dict) -> bool | None:
    if pair["target"] is None:
        return pair["met"]
    if pair["times"]:
        return pair["times"] >= pair["target"]
    value = pair["ours"]["median"]
    return value >= pair["target"] if pair["least"] else value < pair["target"]


def table(pairs: list[dict]) -> str:
    """Markdown, which a terminal shows well enough."""
    lines = ["| What | Ours | Example | Times | Tuned example | Times | Target |"]
    lines.append("|:--|--:|--:|--:|--:|--:|:--|")
    for pair in pairs:
        cells = [pair["what"], _figure(pair, "ours"), _figure(pair, "theirs"), _x(pair["times"])]
        cells += [_figure(pair, "tuned"), _x(pair["times_tuned"]), _target(pair)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _figure(pair: dict, side: str) -> str:
    found = pair[side]
    if not found:
        return ""
    spread = f" ({found['least']:.4g} to {found['most']:.4g})" if found["runs"] > 1 else ""
    return f"{found['median']:,.4g} {pair['unit']}{spread}"


def _x(times: float | None) -> str:
    return f"{times:.3g}x" if times else ""


def _target(pair: dict) -> str:
    if pair["target"] is None:
        return {True: "intervals apart", False: "intervals apart, missed", None: ""}[pair["met"]]
    if pair["times"]:
        wanted = f"{pair['target']:g}x"
    else:
        wanted = f"{'over' if pair['least'] else 'under'} {pair['target']:g} {pair['unit']}"
    return wanted if pair["met"] else f"{wanted}, missed"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
