"""Compare this pipeline with transformers' image-classification example, on this machine.

Rows: prepare-data, training, equal-time, one-image, score-split, memory; on an accelerator: recipe.
Earlier results stay in results/ until their row is measured again.
"""

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path

from pipeline.errors import UserError, run_main


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks", description=__doc__)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="default: all for this host")
    parser.add_argument("--quick", action="store_true", help="all rows, reduced, in 3 minutes")
    parser.add_argument("--dataset", default="digits", help="a Hub id or a local folder")
    parser.add_argument("--model", help="a pretrained backbone")
    parser.add_argument("--minutes", type=float, default=30, help="for each side in equal-time")
    parser.add_argument("--recipe", default="vit-base", help="recipe for the row recipe")
    args = parser.parse_args()

    # Imported after parsing, since these imports take seconds.
    import datasets
    from transformers.utils import logging

    from benchmarks import machine, report, rows
    from pipeline import runs

    names = args.rows or [name for name in rows.ROWS if args.quick or name not in rows.LONG]
    if wrong := [name for name in names if name not in rows.ROWS]:
        raise UserError(f'There is no row "{wrong[0]}"; choose from {", ".join(rows.ROWS)}.')
    logging.set_verbosity_error()
    datasets.disable_caching()  # so that each side prepares its own images
    args.gflops = {name: machine.matrix_rate(name) for name in ("float32", "bfloat16")}
    about = {"gflops": args.gflops, "hardware": runs.hardware(), "versions": runs.versions()}
    about |= {"code_revision": runs.code_revision(), "measured": time.strftime("%Y-%m-%d")}
    about |= {"dataset": Path(args.dataset).name + ", small (--quick)" * args.quick}
    for key in ("dataset", "model"):
        if Path(getattr(args, key) or "-").is_dir():  # the working directory changes below
            setattr(args, key, str(Path(getattr(args, key)).resolve()))
    file = Path("results", "benchmarks_quick.json" if args.quick else "benchmarks.json").resolve()
    results = runs.read_json(file) or {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name in names:
            print(time.strftime("%X"), name, flush=True)
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
                comparisons = rows.ROWS[name](args)
            about["note"] = " ".join(rows.ROWS[name].__doc__.split())
            results[name] = about | {"comparisons": comparisons}
            results = {name: results[name] for name in rows.ROWS if name in results}
            runs.write_json(file, results)
    report.draw(results, file.with_suffix(".png"))
    print(f"\n{report.as_table(results)}\n\nSaved: {file}, {file.with_suffix('.png')}")


if __name__ == "__main__":
    run_main(main, "Stopped. The rows measured so far are in results/.")
