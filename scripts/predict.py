"""Classify images with a model by plain `transformers.pipeline()`."""

import argparse
from pathlib import Path

from pipeline.errors import run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="a folder, or a Hub id as name/model or name/model@rev")
    parser.add_argument("images", nargs="*", type=Path, help="files (default: five test images)")
    parser.add_argument("--dataset", help="of the test images; default: the one it was trained on")
    args = parser.parse_args()

    # After the arguments: these take seconds to import.
    from transformers import pipeline

    from pipeline import runs
    from pipeline.data.loading import load_split
    from pipeline.data.transforms import input_size
    from pipeline.explain import figures
    from pipeline.recipe import data_arguments
    from pipeline.training.model import load_model

    name, revision = runs.split_revision(args.model)
    model, processor = load_model(args.model)  # one sentence for what is missing
    examples = figures.examples_from_files(args.images)
    if not examples:
        data = data_arguments(args.model, args.dataset)
        test = load_split(
            data, "test", input_size(processor), processor.resample,
            names=list(model.config.id2label.values()), crop=bool(processor.do_center_crop),
        )  # fmt: skip
        examples = figures.examples_from_rows(test, range(5))
    classify = pipeline("image-classification", model=name, revision=revision)
    for example in examples:
        answer = classify(example.open(), top_k=1)[0]
        truth = f" (true: {example.label})" if example.label else ""
        print(f"{example.name}{truth}: {answer['label']}, {answer['score']:.1%}")


if __name__ == "__main__":
    run_main(main)
