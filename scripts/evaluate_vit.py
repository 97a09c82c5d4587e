"""Score a fine-tuned model on the test split of its dataset; write results and figures."""

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
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--bf16", action="store_true", help="quicker and rounded: a first look")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder to write to")
    arguments = parser.parse_args()

    # After the arguments: these take seconds.
    from accelerate import PartialState

    from pipeline import evaluation, figures

    model = arguments.model or evaluation.last_run()
    data = evaluation.data_of(model, arguments.dataset)
    results = evaluation.evaluate(model, data, batch_size=arguments.batch_size, bf16=arguments.bf16)
    if not PartialState().is_main_process:
        return
    training = Path(model).expanduser() / "training.json"
    if training.exists():
        results["training"] = json.loads(training.read_text())
        figures.training_curves(
            results["training"].pop("log"), arguments.results / "training_curves.png"
        )
    figures.confusion_matrix(
        results["confusion_matrix"], results["labels"], arguments.results / "confusion_matrix.png"
    )
    evaluation.write(results, arguments.results)
    print(evaluation.as_text(results))
    print("\n".join(f"Written: {path}" for path in sorted(arguments.results.glob("*.*"))))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
