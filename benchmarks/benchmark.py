"""Measure this pipeline side by side with what people use instead, on this machine.

Prints a table, and writes results/benchmarks.json, with each figure's machine and versions, and
results/benchmarks.png. Rows that were measured before stay there until they are measured again;
those of --quick lie apart, in benchmarks_quick.json.
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
    name = "benchmarks_quick.json" if arguments.quick else "benchmarks.json"
    file = arguments.results.resolve() / name
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
            gflops = rows.arithmetic()
            with contextlib.redirect_stderr(io.StringIO()):  # bars of every map and split
                pairs = [summary(pair) for pair in getattr(rows, ROWS[row])(setting)]
            took = {"took_s": round(time.monotonic() - started, 1)}
            when = {"measured": time.strftime("%Y-%m-%d"), "gflops": gflops}
            found[row] = about | when | took | {"pairs": pairs}
            file.write_text(json.dumps(found, indent=1))
    found = {row: found[row] for row in ROWS if row in found}
    figures.benchmark(found, file.with_suffix(".png"))
    print("\n" + as_text(found))
    written = [path for path in (file, file.with_suffix(".png")) if path.exists()]
    print(f"\nWritten: {', '.join(map(str, written))}")


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
    if pair["times"]:
        wanted = [(pair["times"], pair["target"]), (pair["times_tuned"], pair["target_tuned"])]
        wanted = [times >= target for times, target in wanted if target]
        return all(wanted) if wanted else None
    if pair["target"] is None:
        return pair["met"]
    value = pair["ours"]["median"]
    return value >= pair["target"] if pair["least"] else value < pair["target"]


def as_text(found: dict) -> str:
    """A table in Markdown, which a terminal shows well enough, for each machine and dataset."""
    tables = {}
    for row in found.values():
        small = ", small (QUICK)" if row["quick"] else ""
        where = f"{row['hardware']}, {row['dataset']}, {row['measured']}{small}"
        tables.setdefault(where, []).append(row)
    return "\n\n".join(
        f"{where}:\n\n{table([pair for row in rows for pair in row['pairs']])}\n"
        f"- Matrix products there: {_arithmetic(rows)}."
        for where, rows in tables.items()
    )


def _arithmetic(rows: list[dict]) -> str:
    rates = {name: [row["gflops"][name] for row in rows] for name in rows[0]["gflops"]}
    return ", ".join(
        f"{_number(statistics.median(found))} GFLOP/s in {name}" for name, found in rates.items()
    )


def table(pairs: list[dict]) -> str:
    """Medians, and the least and the most of several runs."""
    lines = ["| | Ours | Example | | Tuned example | | Target |", "|:--|--:|--:|--:|--:|--:|:--|"]
    for pair in pairs:
        cells = [f"{pair['what']}, {pair['unit']}", _figure(pair["ours"])]
        cells += [_figure(pair["theirs"]), _x(pair["times"])]
        cells += [_figure(pair["tuned"]), _x(pair["times_tuned"]), _target(pair)]
        lines.append("| " + " | ".join(cells) + " |")
    said = {}
    for pair in pairs:
        if pair["sides"]:
            said.setdefault(pair["sides"], []).append(pair["what"])
    notes = [f"- {'; '.join(names)}: {sides}." for sides, names in said.items()]
    return "\n".join([*lines, "", *notes])


def _figure(found: dict | None) -> str:
    if not found:
        return ""
    spread = f" ({_number(found['least'])} to {_number(found['most'])})"
    return _number(found["median"]) + (spread if found["runs"] > 1 else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def _x(times: float | None) -> str:
    return f"{times:.3g}x" if times else ""


def _target(pair: dict) -> str:
    if pair["met"] is None:
        return ""
    if pair["times"]:
        tuned = pair["target_tuned"]
        wanted = f"{pair['target']:g}x" + (f", {tuned:g}x tuned" if tuned else "")
    elif pair["target"]:
        wanted = f"{'over' if pair['least'] else 'under'} {pair['target']:g}"
    else:
        wanted = "intervals apart"
    return wanted if pair["met"] else f"{wanted}: missed"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
