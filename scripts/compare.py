"""Compare two evaluated runs on the same test images, or average several seeds of one recipe."""

import argparse
from pathlib import Path

from pipeline.errors import UserError, run_main

SHOWN = 60  # images on the contact sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="run names or model folders")
    parser.add_argument("--seeds", action="store_true", help="average runs that differ by seed")
    args = parser.parse_args()

    # Imported after parsing, since these imports take seconds.
    from pipeline import plots, runs
    from pipeline.data.decoding import open_image
    from pipeline.evaluation.compare import average, compare, load_evaluated

    folders = [runs.results_folder(run) for run in args.runs]
    files = [folder / "evaluation_results.json" for folder in folders]
    found = [runs.read_json(file) for file in files]
    if missing := [name for name, results in zip(args.runs, found, strict=True) if not results]:
        raise UserError(f"There are no results of {missing[0]}: run `make evaluate` for it first.")
    if len({*folders}) < len(folders):
        raise UserError("Two of the runs have one results folder: name different runs.")
    for name, results in zip(args.runs, found, strict=True):
        model, hashes = results["model"]["name"], results["model"]["sha256"]
        if Path(model).expanduser().is_dir() and runs.model_hashes(model) != hashes:
            raise UserError(f"{name} was trained again after `make evaluate`: evaluate it again.")
    if args.seeds:
        table = average(found)
        for file, results in zip(files, found, strict=True):  # for each model's card
            runs.write_json(file, results | {"seeds": table})
        for key in table.keys() - {"seeds"}:
            low, high = table[key]["interval"]
            print(f"{key:10} {table[key]['mean']:.4f}  (95 % interval {low:.4f} to {high:.4f})")
        return

    if len(found) != 2:
        raise UserError('Name two runs, such as RUNS="first second".')
    split, labels = load_evaluated(found[0])
    report = compare(*found, labels)
    folder = runs.RESULTS / "compare" / "_".join(folder.name for folder in folders)
    runs.write_json(folder / "comparison.json", report)
    names, sheet = found[0]["labels"], []
    for row in report["rows"][:: len(report["rows"]) // SHOWN + 1]:
        answers = " / ".join(names[results["predictions"][row]] for results in found)
        image = open_image(split[row]["image"], f"row {row}")
        sheet.append((f"{names[labels[row]]}:\n{answers}", image))
    (folder / "differences.png").unlink(missing_ok=True)
    if sheet:
        plots.image_sheet(sheet, 10, folder / "differences.png", title=" / ".join(args.runs))
    low, high = report["difference_interval"]
    verdict = "differ" if report["different"] else "do not differ significantly"
    print(
        f"Accuracy {found[0]['accuracy']:.2%} and {found[1]['accuracy']:.2%}: difference "
        f"{report['difference']:+.2%} (95 % interval {low:+.2%} to {high:+.2%}).\n"
        f"Only the first is correct on {report['only_first']} images, only the second on "
        f"{report['only_second']}: the runs {verdict} (McNemar, p = {report['p_value']:.2g})."
    )
    changes = report["by_class"].items()
    print(", ".join(f"{name} -{n['only_first']} +{n['only_second']}" for name, n in changes))
    print(f"Saved: {folder}")


if __name__ == "__main__":
    run_main(main)
