"""Audit a dataset: duplicates, likely label errors, unusual images, class balance."""

import argparse

from pipeline.errors import run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--dataset", help="a Hub id or folder (default: the model's, or CIFAR-10)")
    parser.add_argument("--model", help="a backbone or a fine-tuned model; finds label errors")
    parser.add_argument("--image_column", help="default: the only image column")
    parser.add_argument("--label_column", help="default: the only label column")
    parser.add_argument("--image_size", type=int, help="model input size; smaller is faster")
    args = parser.parse_args()

    # Imported after parsing, since these imports take seconds.
    from dataclasses import replace

    from pipeline import plots, runs
    from pipeline.evaluation.audit import as_text, audit, audit_folder
    from pipeline.recipe import DataArguments, data_arguments

    given = {key: getattr(args, key) for key in ("dataset", "image_column", "label_column")}
    given = {key: value for key, value in given.items() if value}
    data = DataArguments(**given)
    if args.model:  # the splits of its recipe, if it has one
        data = replace(data_arguments(args.model, args.dataset), max_train_samples=None, **given)
    report, sheets = audit(data, args.model, args.image_size)
    folder = audit_folder(data.dataset)
    runs.write_json(folder / "audit.json", report)
    (folder / "report.txt").write_text(as_text(report), "utf-8")
    for name, images in sheets.items():
        (folder / f"{name}.png").unlink(missing_ok=True)
        if images:
            plots.image_sheet(images, 10, folder / f"{name}.png", title=name.replace("_", " "))
    print(as_text(report) + f"Saved: {folder}")


if __name__ == "__main__":
    run_main(main)
