"""Draw where a model looks, in every layer, and measure how far its maps can be believed."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from pipeline.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", help="a folder, or a Hub id as name@rev (default: the last run)")
    parser.add_argument("--dataset", help="default: the one it was trained on")
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="files to draw")
    parser.add_argument("--rows", type=int, nargs="+", default=[], help="test images to draw")
    parser.add_argument("--layer", type=int, default=-1, help="from 0; -1 is the last")
    parser.add_argument("--head", type=int, default=0, help="from 0")
    parser.add_argument("--class", dest="target", help="whose relevance (default: the predicted)")
    parser.add_argument("--faithfulness", type=int, default=200, help="test images; 0 for none")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder to write to")
    arguments = parser.parse_args()

    # After the arguments: these take seconds.
    from pipeline import evaluation, figures, visualization
    from pipeline.data import load_splits
    from pipeline.model import load

    name = arguments.model or evaluation.last_run()
    pictures = visualization.from_files(arguments.images)
    model, processor = load(*evaluation.split_revision(name))
    if not arguments.images or arguments.rows or arguments.faithfulness:
        data = evaluation.data_of(name, arguments.dataset)
        size = processor.size["height"]
        test = load_splits(data, size, processor.resample, only="test")["test"]
        rows = arguments.rows
        if not (rows or arguments.images):
            rows = typical_rows(name, arguments.results, model, processor, test)
        pictures += visualization.from_rows(test, rows)

    folder = arguments.results / "visualizations"
    files = visualization.draw(
        model, processor, pictures, folder, arguments.layer, arguments.head, arguments.target
    )
    print(f"Drew {len(pictures)} images: {len(files)} figures in {folder}; see {files[-1]}.")

    if arguments.faithfulness:
        found = visualization.measure(
            model, processor, test, arguments.faithfulness, arguments.head
        )
        found |= {"model": name, "sha256": evaluation.hashes(*evaluation.split_revision(name))}
        path = arguments.results / "attention_faithfulness.json"
        path.write_text(json.dumps(found, indent=1))
        figures.faithfulness_curves(found["curves"], path.with_suffix(".png"))
        report(found)
        print(f"Written: {path}, {path.with_suffix('.png')}")


def typical_rows(name: str, results: Path, model, processor, test) -> list[int]:
    """From the evaluation of this very model where there is one, else by scoring it now."""
    from pipeline import evaluation, visualization

    file = results / "evaluation_results.json"
    if file.exists():
        scored = json.loads(file.read_text())
        if scored["model"]["sha256"] == evaluation.hashes(*evaluation.split_revision(name)):
            predicted, sure = scored["predictions"], scored["confidences"]
            return visualization.typical_rows(test["label"][:], predicted, sure)
    logits, labels = evaluation.predict(model, processor, test)
    sure, predicted = logits.softmax(dim=1).max(dim=1)
    return visualization.typical_rows(labels.tolist(), predicted.tolist(), sure.tolist())


def report(found: dict) -> None:
    print(f"\nFaithfulness on {found['images']} test images, area under the curve:")
    for method, kinds in found["methods"].items():
        for kind, entry in kinds.items():
            line = f"  {method:10} {kind:10} {entry['area']:.3f}"
            if "better_by" in entry:
                low, high = entry["better_by_interval"]
                verdict = (
                    "better than random" if entry["beats_random"] else "NOT better than random"
                )
                line += f"  {verdict}, by {entry['better_by']:+.3f} ({low:+.3f} to {high:+.3f})"
            print(line)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
