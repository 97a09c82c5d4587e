"""Draw a model's attention in every layer, and measure how faithful the maps are."""

import argparse
from pathlib import Path

from pipeline.errors import UserError, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", help="a folder, or a Hub id as name@rev (default: the last run)")
    parser.add_argument("--dataset", help="default: the dataset the model was trained on")
    parser.add_argument("--image_column", help="of that dataset (default: as in training)")
    parser.add_argument("--label_column", help="of that dataset (default: as in training)")
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="files to draw")
    parser.add_argument("--rows", type=int, nargs="+", default=[], help="test images to draw")
    parser.add_argument("--layer", type=int, default=-1, help="layer, from 0; -1 is the last")
    parser.add_argument("--head", type=int, default=0, help="head, from 0")
    parser.add_argument("--class", dest="target", help="relevance target (default: the predicted)")
    parser.add_argument(
        "--faithfulness", type=int, help="test images (default: 200, or 0 with --images)"
    )
    args = parser.parse_args()

    # Imported after parsing, since these imports take seconds.
    from pipeline import plots, runs
    from pipeline.data.decoding import content_hash
    from pipeline.data.loading import load_split
    from pipeline.explain import faithfulness, figures
    from pipeline.recipe import data_arguments
    from pipeline.training.model import load_model

    # Choose the images: files, rows, or a selection from the test split.
    name = args.model or runs.last_run()
    examples = figures.examples_from_files(args.images)
    model, processor = load_model(name)
    model = model.to(runs.device())
    hashes = runs.model_hashes(name)
    folder = runs.results_folder(name)
    test = None
    if args.images and args.faithfulness is None:
        args.faithfulness = 0
    if not args.images or args.rows or args.faithfulness != 0:
        data = data_arguments(name, args.dataset, args.image_column, args.label_column)
        test = load_split(data, "test", processor, names=list(model.config.id2label.values()))
        count = min(200, len(test)) if args.faithfulness is None else args.faithfulness
        if not 0 <= count <= len(test):
            raise UserError(f"Faithfulness needs 1 to {len(test)} images, not {count}.")
        rows = args.rows
        if not (rows or args.images):
            results = runs.read_json(folder / "evaluation_results.json")
            rows = figures.select_rows(model, processor, test, results, hashes)
        examples += figures.examples_from_rows(test, rows)

    # Draw them and replace the run's old figures.
    files = figures.draw(
        model, processor, examples, folder / "visualizations", args.layer, args.head, args.target
    )
    origins = {"user": "user", "dataset": test and content_hash(test)}
    entries = {file.relative_to(folder).as_posix(): origins[o] for file, o in files.items()}
    weights = hashes["model.safetensors"]
    runs.record_files(folder, entries, weights, replace="visualizations")
    runs.link_results(folder, "visualizations")
    print(f"Drew {len(files)} figures of {len(examples)} images: {folder}/visualizations.")

    if args.faithfulness != 0:
        results = faithfulness.measure_faithfulness(model, processor, test, count, args.head)
        path = folder / "attention_faithfulness.json"
        origin = {"model": name, "sha256": hashes, "data": origins["dataset"]}
        runs.write_json(path, results | origin)
        plots.faithfulness_curves(results["curves"], path.with_suffix(".png"))
        runs.record_files(folder, {path.name: None, path.stem + ".png": None}, weights)
        report(results)
        print(f"Saved: {path}, {path.with_suffix('.png')}")


def report(results: dict) -> None:
    print(f"\nFaithfulness on {results['images']} test images, area under the curve (AUC):")
    for method, kinds in results["methods"].items():
        for kind, entry in kinds.items():
            line = f"  {method:10} {kind:10} {entry['auc']:.3f}"
            if method != "random":
                low, high = entry["gain_interval"]
                verdict = "better" if entry["beats_random"] else "NOT better"
                line += f"  {verdict} than random order: {entry['gain_over_random']:+.3f} "
                line += f"({low:+.3f} to {high:+.3f})"
            print(line)


if __name__ == "__main__":
    run_main(main)
