"""Score a fine-tuned model on the test split of its dataset; write results and figures."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from pipeline.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", help="a folder, or a Hub id as name@rev (default: the last run)")
    parser.add_argument("--dataset", help="default: the one it was trained on")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder to write to")
    arguments = parser.parse_args()
    model = arguments.model or last_run()

    # After the arguments: these take seconds.
    from accelerate import PartialState

    from pipeline import evaluation, figures
    from pipeline.recipe import DataArguments

    data = evaluation.trained_on(model)
    if arguments.dataset:
        data = replace(
            data or DataArguments(),
            dataset=arguments.dataset,
            dataset_config=None,
            dataset_revision=None,
        )
    if data is None:
        raise UserError(f'"{model}" has no recipe.yaml: say which data to score with DATASET=.')
    results = evaluation.evaluate(model, data, batch_size=arguments.batch_size)
    if not PartialState().is_main_process:
        return
    training = Path(model).expanduser() / "training.json"
    if training.exists():
        results["training"] = json.loads(training.read_text())
        figures.training_curves(
            results["training"].pop("log"), arguments.output / "training_curves.png"
        )
    figures.confusion_matrix(
        results["confusion_matrix"], results["labels"], arguments.output / "confusion_matrix.png"
    )
    evaluation.write(results, arguments.output)
    print(evaluation.as_text(results))
    print("\n".join(f"Written: {path}" for path in sorted(arguments.output.glob("*.*"))))


def last_run() -> str:
    runs = sorted(Path("models").glob("*/training.json"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UserError("There is no trained model in models/: train one, or name one with MODEL=.")
    return str(runs[-1].parent)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
