"""Classify images with a model, published or in a folder, by plain `transformers.pipeline()`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from pipeline.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="a folder, or a Hub id as name/model or name/model@rev")
    parser.add_argument("images", nargs="*", type=Path, help="files (default: five test images)")
    parser.add_argument("--dataset", help="whose test images; default: the one it was trained on")
    arguments = parser.parse_args()

    # After the arguments: these take seconds.
    from transformers import pipeline

    from pipeline import evaluation, visualization
    from pipeline.data import load_splits
    from pipeline.model import load

    name, revision = evaluation.split_revision(arguments.model)
    _, processor = load(name, revision)  # says in words what is not there
    pictures = visualization.from_files(arguments.images)
    if not pictures:
        data = evaluation.data_of(arguments.model, arguments.dataset)
        size = processor.size["height"]
        test = load_splits(data, size, processor.resample, only="test")["test"]
        pictures = visualization.from_rows(test, range(5))
    classify = pipeline("image-classification", model=name, revision=revision)
    for picture in pictures:
        answer = classify(picture.read(), top_k=1)[0]
        truth = f" (truly {picture.truth})" if picture.truth else ""
        print(f"{picture.name}{truth}: {answer['label']}, {answer['score']:.1%}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
