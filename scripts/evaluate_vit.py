"""Evaluate a fine-tuned model on the test split, and save its metrics and figures."""

import argparse
from pathlib import Path

from pipeline.errors import run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", help="a folder, or a Hub id as name@rev (default: the last run)")
    parser.add_argument("--dataset", help="default: the dataset the model was trained on")
    parser.add_argument("--image_column", help="of that dataset (default: as in training)")
    parser.add_argument("--label_column", help="of that dataset (default: as in training)")
    parser.add_argument("--batch_size", type=int, default=128, help="batch size per process")
    parser.add_argument("--bf16", action="store_true", help="a faster estimate in bfloat16")
    parser.add_argument(
        "--corruptions", type=int, nargs="?", const=1000, default=0,
        help="measure robustness on this many images (default: 1000)",
    )  # fmt: skip
    parser.add_argument("--ood_datasets", nargs="+", default=[], help="more OOD folders or Hub ids")
    args = parser.parse_args()

    # Imported after parsing, since these imports take seconds.
    from accelerate import PartialState

    from pipeline import plots, runs
    from pipeline.evaluation.evaluate import as_text, evaluate, save
    from pipeline.recipe import data_arguments

    model = args.model or runs.last_run()
    data = data_arguments(model, args.dataset, args.image_column, args.label_column)
    results = evaluate(
        model, data, batch_size=args.batch_size, bf16=args.bf16,
        corruptions=args.corruptions, ood_datasets=tuple(args.ood_datasets),
    )  # fmt: skip
    if not PartialState().is_main_process:
        return
    training = runs.read_json(Path(model).expanduser() / "training.json")
    log = training.pop("log") if training else []
    if training:
        results["training"] = training

    # Save the results first, so that an error in a figure loses nothing.
    folder = runs.results_folder(model)
    save(results, folder)
    print(as_text(results))
    files = plots.evaluation_figures(results, log, folder)
    weights = results["model"]["sha256"]["model.safetensors"]
    runs.record_files(folder, dict.fromkeys(files), weights)
    print("\n".join(f"Saved: {path}" for path in sorted(folder.glob("*.*"))))


if __name__ == "__main__":
    run_main(main)
