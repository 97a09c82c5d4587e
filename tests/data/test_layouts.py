"""Images on disk equal images loaded, per class and split, or one sentence says why not."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from layouts import LAYOUTS, csv_beside_the_folder
from pipeline.data.decoding import hash_file, hash_files
from pipeline.data.folders import walk
from pipeline.data.loading import load_raw
from pipeline.data.sources import load_source
from pipeline.data.streaming import load_stream
from pipeline.errors import UserError
from pipeline.recipe import DataArguments
from pipeline.runs import read_json
from samples import ROOT, draw_image


@pytest.fixture(params=LAYOUTS, ids=lambda layout: layout.__name__)
def layout(request, tmp_path):
    """A dataset's folder, and what it holds or why it is refused."""
    folder = tmp_path / "data set"
    folder.mkdir()
    expected = request.param(folder)
    inside = [path for path in folder.iterdir() if path.is_dir()]
    only = inside[0] if request.param.__name__ in ("odd_path", "csv_beside_the_folder") else folder
    return only, expected


def loaded(folder: Path) -> Counter:
    """What the pipeline has of it, as (split, class, hash), in the published splits."""
    data = DataArguments(dataset=str(folder), validation_size=0.25)
    roles, counts = load_source(data).roles, Counter()
    for name, split in load_raw(data).items():
        names = split.features["label"].names
        labels = [names[label] if label >= 0 else None for label in split["label"]]
        published = name if name in roles else "train"  # it was split off
        counts.update(
            (published, label, int(digest))
            for label, digest in zip(labels, hash_files(split), strict=True)
        )
    return counts


def test_images_on_disk_are_the_images_loaded(layout):
    folder, expected = layout
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            loaded(folder)
    else:
        found = loaded(folder)
        assert sorted(found.elements(), key=repr) == sorted(expected.elements(), key=repr)


def streamed(folder: Path) -> Counter:
    """The same of a stream."""
    data, counts = DataArguments(dataset=str(folder), streaming=True), Counter()
    roles = load_source(data).roles
    for name in ("train", "validation", "test"):
        if name not in roles and "train" not in roles:
            continue
        stream = load_stream(data, name)
        names = stream.features["label"].names
        for table in stream.iter(10):
            for row in table.to_pylist():
                label = names[row["label"]]
                counts[
                    name if name in roles else "train", label, hash_file(row["image"]["bytes"])
                ] += 1
    return counts


@pytest.mark.slow
def test_a_stream_gives_the_same_images(layout):
    folder, expected = layout
    if folder.name == "saved_to_disk":
        expected = "x"
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            streamed(folder)
    elif any(label is None for _, label, _ in expected):
        with pytest.raises(UserError, match='split "test".* lacks a label'):
            streamed(folder)
    else:
        found = streamed(folder)
        assert sorted(found.elements(), key=repr) == sorted(expected.elements(), key=repr)


@pytest.mark.slow
def test_a_folder_with_a_csv_beside_it_goes_through_three_commands(here, backbones):
    (here / "my data").mkdir()
    csv_beside_the_folder(here / "my data")
    folder = here / "my data" / "pets"
    for name in ("Makefile", "scripts"):
        (here / name).symlink_to(ROOT / name)
    # A small model in the Hub's cache, under the name of the backbone that `make train` takes.
    model = here / "hf/hub/models--google--vit-base-patch16-224-in21k"
    shutil.copytree(backbones["vit"], model / "snapshots" / "0000")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0000")
    environment = os.environ | {"HF_HOME": str(here / "hf"), "OMP_NUM_THREADS": "1"}
    python = f"BIN={Path(sys.executable).parent}"

    def make(*arguments: str) -> str:
        command = ["make", "-o", ".venv/.runs", python, *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    trained = make("train", f"DATASET={folder}")
    assert "train is 'train', validation is 'validation', test is 'test'" in trained
    assert "on 12 images" in trained
    assert "(4 images)" in trained
    make("evaluate")
    results = read_json(here / "results/vit-base/evaluation_results.json")
    assert results["labels"] == ["cat", "dog"]
    assert results["support"] == [3, 3]
    assert "Drew" in make("visualize")
    assert (here / "results/vit-base/visualizations/overview.png").is_file()


def test_loops_of_links_end(tmp_path):
    for name, other in (("cat", "dog"), ("dog", "cat")):
        (tmp_path / name).mkdir()
        draw_image(len(name)).save(tmp_path / name / "0.png")
        (tmp_path / name / "link").symlink_to(tmp_path / other)
    files = [path for path in walk(tmp_path) if path.is_file()]
    assert [str(path.relative_to(tmp_path)) for path in files] == [
        "cat/0.png", "cat/link/0.png", "dog/0.png", "dog/link/0.png",
    ]  # fmt: skip
