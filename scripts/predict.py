"""Classify images with a model, and write a table of its predictions."""

import argparse
from pathlib import Path

from pipeline.errors import UserError, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", help="a folder or a Hub id (default: the last run)")
    parser.add_argument(
        "--images", nargs="+", help="files, folders or patterns (default: a split of the dataset)"
    )
    parser.add_argument("--dataset", help="without --images (default: the one it was trained on)")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--max_images", type=int, help="classify only the first ones")
    parser.add_argument("--top_k", type=int, default=3, help="classes to list for each image")
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch")
    parser.add_argument(
        "--output", type=Path, help=".csv or .parquet (default: results/<run>/predictions.csv)"
    )
    args = parser.parse_args()

    # Imported after parsing, since these imports take seconds.
    from itertools import islice

    from pipeline import runs
    from pipeline.evaluation.predictions import find_images, predict_to_file, split_images
    from pipeline.recipe import data_arguments

    if (args.max_images or 0) < 0:
        raise UserError(f"max_images is {args.max_images}; it must be at least 0.")
    model = args.model or runs.last_run()
    output = args.output or runs.results_folder(model) / "predictions.csv"
    if args.images:
        items = find_images(args.images)
    else:
        items = split_images(data_arguments(model, args.dataset), args.split)
    items = islice(items, args.max_images)
    counts = predict_to_file(model, items, output, args.top_k, args.batch_size)
    for row in counts["first"]:
        print(
            f"{row['image']}: " + (row["error"] or f"{row['label_1']}, {row['probability_1']:.1%}")
        )
    rest = counts["images"] - len(counts["first"])
    print(
        (f"… and {rest:,} more.\n" if rest > 0 else "")
        + f"Classified {counts['images'] - counts['unreadable']:,} images"
        + (f"; {counts['unreadable']:,} could not be read" if counts["unreadable"] else "")
        + (f"; {counts['ood']:,} look unlike the training data" if counts["ood"] else "")
        + f".\nTable: {output}"
    )


if __name__ == "__main__":
    run_main(main)
