import csv
import json
from pathlib import Path

import pyarrow.parquet
import pytest
from PIL import Image
from transformers import pipeline

import predict
from pipeline.errors import UserError
from pipeline.evaluation.predictions import find_images, predict_to_file, split_images
from pipeline.recipe import DataArguments, data_arguments
from samples import draw_image


@pytest.fixture
def photos(measured) -> Path:
    """A folder of 20 images of many sizes and modes, two files that are none, and a note."""
    folder = measured / "photos"
    (folder / "more").mkdir(parents=True)
    for i in range(20):
        image = draw_image(i, size=(8 + 3 * i, 40 - i))
        image = image.convert(["RGB", "L", "P", "RGBA"][i % 4])
        image.save(folder / ("more" if i % 2 else "") / f"{i:02}.png")
    (folder / "broken.jpg").write_bytes((folder / "00.png").read_bytes()[:60])
    (folder / "empty.png").touch()
    (folder / "note.txt").write_text("not an image")
    return folder


def read(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_gives_the_answers_of_pipeline(photos):
    counts = predict_to_file("models/tiny", find_images(["photos"]), Path("out.csv"), 3, 7)
    assert (counts["images"], counts["unreadable"]) == (22, 2)
    rows = read(Path("out.csv"))
    assert [row["image"] for row in rows] == sorted(
        (str(p) for p in Path("photos").rglob("*.*g")), key=lambda p: (p.count("/"), p)
    )
    classify = pipeline("image-classification", "models/tiny")
    for row in rows:
        if row["error"]:
            assert "cannot be decoded" in row["error"]
            assert row["label_1"] == row["probability_3"] == row["ood_score"] == ""
            continue
        for k, answer in enumerate(classify(row["image"], top_k=3), 1):
            assert row[f"label_{k}"] == answer["label"]
            assert float(row[f"probability_{k}"]) == pytest.approx(answer["score"], abs=1e-4)
        assert row["is_ood"] in ("true", "false")
    assert not Path("out.csv.part").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_labels_of_several_letters_are_whole_also_of_a_single_image(photos, count):
    file = Path("models/tiny/config.json")
    config = json.loads(file.read_text())
    names = {str(i): f"class number {i}" for i in range(10)}
    config |= {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    file.write_text(json.dumps(config))
    files = [f"photos/0{2 * i}.png" for i in range(count)]
    predict_to_file("models/tiny", find_images(files), Path("out.csv"), 2)
    classify = pipeline("image-classification", "models/tiny")
    for row in read(Path("out.csv")):
        assert row["label_1"] == classify(row["image"])[0]["label"] in names.values()
        assert row["label_2"] == classify(row["image"])[1]["label"]


def test_parquet_and_a_split_hold_the_same_as_csv(measured):
    data = data_arguments("models/tiny")
    for name in ("a.csv", "a.parquet"):
        predict_to_file("models/tiny", split_images(data, "test"), Path(name), top_k=99)
    table = pyarrow.parquet.read_table("a.parquet").to_pylist()
    assert len(table) == 360
    for row, line in zip(table, read(Path("a.csv")), strict=True):
        assert row["label_10"] == line["label_10"]
        assert row["probability_1"] == pytest.approx(float(line["probability_1"]), rel=1e-5)
        assert row["error"] is None


def test_patterns_find_files_and_none_is_an_error(photos):
    names = [item.name for item in find_images(["photos/0*.png", "photos/more/*.png"])]
    assert len(names) == 15
    with pytest.raises(UserError, match=r'no image in "photos/\*.tif"'):
        list(find_images(["photos/*.tif"]))
    with pytest.raises(UserError, match=r'no image in "nowhere"'):
        find_images(["photos", "nowhere"])  # before the first folder is read


def test_no_image_in_a_folder_is_left_out_in_silence(here):
    folder = here / "mixed"
    folder.mkdir()
    for name in ("1.png", "no_extension"):
        draw_image(0).save(folder / name, "PNG")
    for name in ("2.HEIC", "note.txt", "paper.pdf"):
        (folder / name).write_bytes(b"%PDF or other")
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    found = {Path(item.name).name: item for item in find_images(["mixed"])}
    assert sorted(found) == ["1.png", "2.HEIC", "link.png", "no_extension"]
    assert found["no_extension"].open().size == draw_image(0).size
    for name in ("2.HEIC", "link.png"):
        with pytest.raises(UserError, match="cannot be decoded"):
            found[name].open()
    link = next(iter(find_images([str(folder / "link.p*")])))
    with pytest.raises(UserError, match="cannot be decoded"):
        link.open()


def test_a_split_that_does_not_exist_and_a_stream_are_refused(image_folder):
    (image_folder / "train").rename(image_folder / "test")
    data = DataArguments(dataset=str(image_folder))
    with pytest.raises(UserError, match=r"has no validation split, only test\."):
        next(split_images(data, "validation"))
    with pytest.raises(UserError, match="is streamed, so its images can't be listed"):
        next(split_images(DataArguments(dataset="digits", streaming=True), "test"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": Path("out.txt")}, r"must end in .csv or .parquet"),
        ({"top_k": 0}, r"top_k is 0"),
        ({"batch_size": 0}, r"batch_size is 0"),
    ],
)
def test_what_can_not_be_written_is_refused_before_an_image_is_opened(measured, options, message):
    def items():
        raise AssertionError("an image was asked for")
        yield

    arguments = {"output": Path("out.csv")} | options
    with pytest.raises(UserError, match=message):
        predict_to_file("models/tiny", items(), **arguments)


def test_an_interrupted_table_does_not_appear(measured):
    def items():
        yield from list(find_images(["cat.png"]))
        raise KeyboardInterrupt

    Image.new("RGB", (9, 9)).save("cat.png")
    with pytest.raises(KeyboardInterrupt):
        predict_to_file("models/tiny", items(), Path("out.csv"), batch_size=1)
    assert not Path("out.csv").exists()


def test_the_script_says_what_it_did(photos, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["predict.py", "--model=models/tiny", "--images", "photos"])
    predict.main()
    text = capsys.readouterr().out
    assert "photos/00.png: " in text
    assert "Classified 20 images; 2 could not be read" in text
    assert "Table: results/tiny/predictions.csv" in text
