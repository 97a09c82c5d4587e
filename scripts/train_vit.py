"""Fine-tune an image classifier with a recipe. The same command resumes an interrupted run."""

import argparse

from pipeline.errors import run_main

PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Any recipe key is also an option, such as --learning_rate=2e-4.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe", default="vit-base", help="a name, a YAML file, or hub:name/model"
    )
    parser.add_argument("--run", help="name of the run (default: the recipe's name)")
    parser.add_argument("--restart", action="store_true", help="train again from the start")
    args, overrides = parser.parse_known_args()

    # Imported after parsing, since these imports take seconds.
    from transformers.utils.logging import disable_progress_bar

    from pipeline.evaluation.calibration import calibrate_run
    from pipeline.recipe import load_recipe
    from pipeline.training.train import train

    disable_progress_bar()  # for loading and saving weights, not for training
    recipe = load_recipe(args.recipe, overrides, args.run)
    summary = train(recipe, restart=args.restart)
    if recipe.objective.calibrate:
        calibrate_run(recipe)
    if recipe.training.process_index == 0:
        report(summary)


def report(summary: dict) -> None:
    if not summary["new"]:
        print(f"The run {summary['run']} is already finished; use ARGS=--restart to train again.")
    validation = "The saved weights were not validated."
    if summary["validation_accuracy"] is not None:
        validation = (
            f"Validation accuracy {summary['validation_accuracy']:.2%} "
            f"({summary['validation_images']:,} images) at step {summary['best_step']}."
        )
    print(
        f"\nTrained {summary['epochs']:.3g} epochs on {summary['training_images']:,} images "
        f"in {summary['wall_s'] / 60:.1f} minutes on {summary['hardware']}, "
        f"{PRECISIONS[summary['precision']]}.\n"
        f"{validation}\n"
        f"Model:       {summary['model_folder']}\n"
        f"Next:        make evaluate MODEL={summary['model_folder']}"
    )


if __name__ == "__main__":
    run_main(main, "Stopped. Run the same command to resume from the last checkpoint.")
