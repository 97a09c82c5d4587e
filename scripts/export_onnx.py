"""Export a model to ONNX for the browser, and check each copy's predictions."""

import argparse

from pipeline.errors import run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", help="a folder or a Hub id (default: the last run)")
    parser.add_argument("--dataset", help="to check on (default: the one it was trained on)")
    parser.add_argument("--max_images", type=int, help="check on only this many images")
    args = parser.parse_args()

    # Imported after parsing, since these imports take seconds.
    from pipeline import runs
    from pipeline.publish.onnx import export
    from pipeline.recipe import data_arguments

    model = args.model or runs.last_run()
    report = export(model, data_arguments(model, args.dataset), args.max_images)
    print(f"\n{'file':22}  {'MB':>6}  same class  accuracy  ms per image")
    for file, variant in report["variants"].items():
        print(
            f"{file:22}  {variant['bytes'] / 1e6:6.1f}  {variant['same_class']:10.1%}  "
            f"{variant['accuracy']:8.2%}  {variant['ms_per_image']:12.1f}"
        )
    print(f"Saved: {runs.results_folder(model)}/onnx. `make push` publishes these files.")


if __name__ == "__main__":
    run_main(main)
