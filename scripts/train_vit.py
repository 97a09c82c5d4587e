"""Fine-tune a Vision Transformer by a recipe. Run again, it resumes."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from pipeline.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Any key of a recipe can be given too, as --learning_rate=2e-4.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", default="vit-base", help="its name, or a YAML file")
    parser.add_argument("--run", help="name of the model's folder (default: the recipe's name)")
    parser.add_argument(
        "--restart", action="store_true", help="train anew, not on from what is there"
    )
    arguments, overrides = parser.parse_known_args()

    # After the arguments: these take seconds.
    from transformers.utils.logging import disable_progress_bar

    from pipeline.recipe import load_recipe
    from pipeline.training import train

    disable_progress_bar()  # of reading and writing weights; the one of training stays
    recipe = load_recipe(arguments.recipe, overrides, arguments.run)
    summary = train(recipe, restart=arguments.restart)
    if recipe.training.process_index == 0:
        report(summary)


def report(summary: dict) -> None:
    if not summary["new"]:
        print(f"The run {summary['run']} is finished; ARGS=--restart trains it anew.")
    validated = "Not validated: the recipe asked for none.\n"
    if summary["validation_accuracy"] is not None:
        validated = (
            f"Best validation accuracy {summary['validation_accuracy']:.2%} "
            f"({summary['validation_images']:,} images), at step {summary['best_step']}.\n"
        )
    print(
        f"\nTrained {summary['epochs']:.3g} epochs over {summary['training_images']:,} images "
        f"in {summary['wall_s'] / 60:.1f} minutes on {summary['hardware']}, "
        f"{'bfloat16' if summary['precision'] == 'bf16' else 'float32'}.\n"
        f"{validated}"
        f"Model:       {summary['model_folder']}\n"
        f"Next:        make evaluate MODEL={summary['model_folder']}"
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from the last checkpoint.")
