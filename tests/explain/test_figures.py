import json

import pytest
import torch
from PIL import Image

import visualize_attention
from pipeline.data.loading import load_split
from pipeline.errors import UserError
from pipeline.explain import figures
from pipeline.explain.faithfulness import measure_faithfulness
from pipeline.recipe import DataArguments
from pipeline.training.model import load_model
from samples import draw_image, image_processor, run_script


@pytest.fixture
def model(trained):
    return load_model(trained)


def test_examples_are_one_per_class_and_the_most_confident_errors():
    labels = [0, 0, 1, 1, 2, 2, 2]
    predictions = [1, 0, 1, 0, 0, 2, 1]
    confidences = [0.5, 0.9, 0.8, 0.7, 0.6, 0.9, 0.99]
    assert figures.select_examples(labels, predictions, confidences) == [1, 2, 5, 6, 3, 4, 0]


def test_of_many_classes_twenty_are_drawn():
    labels = list(range(1000))
    assert figures.select_examples(labels, labels, [0.9] * 1000) == list(range(20))


def test_files_of_one_name_get_names_of_their_own(here):
    for path in ("x/a.png", "y/a.png", "z/a_2.png"):
        (here / path).parent.mkdir()
        draw_image(0).save(here / path)
    examples = figures.examples_from_files([here / p for p in ("x/a.png", "y/a.png", "z/a_2.png")])
    assert [example.name for example in examples] == ["a", "a_2", "a_2_2"]


@pytest.mark.parametrize(
    ("logit", "title"), [(0.0, "cat, 50.0%"), (6.0, "cat, 99.8%"), (9.0, "cat, > 99.9%")]
)
def test_confidence_is_never_shown_as_certainty(logit, title):
    logits, labels = torch.tensor([logit, 0.0]), {0: "cat", 1: "dog"}
    assert figures._title(logits, labels, None) == title
    assert figures._title(logits, labels, "dog") == f"{title}\nlabel: dog"


def test_every_figure_is_drawn_for_files_and_rows(model, here):
    draw_image(0, (40, 30)).save(here / "my photo.png")
    test = load_split(DataArguments(dataset="digits"), "test", image_processor())
    examples = figures.examples_from_files([here / "my photo.png"])
    examples += figures.examples_from_rows(test, [7])
    files = figures.draw(*model, examples, here / "out", layer=0, head=1, target="3")
    name = f"00007_{test[7]['label']}"
    kinds = ("methods", "layers", "heads")
    expected = {f"{n}_{kind}.png" for n in ("my_photo", name) for kind in kinds} | {"overview.png"}
    assert {f.name for f in files} == {f.name for f in (here / "out").iterdir()} == expected
    for file in files:
        with Image.open(file) as image:
            assert len(image.convert("L").getcolors(256)) > 50


def test_faithfulness_is_the_same_for_the_same_seed(model):
    test = load_split(DataArguments(dataset="digits"), "test", image_processor())
    first = measure_faithfulness(*model, test, 20, head=0)
    assert first == measure_faithfulness(*model, test, 20, head=0)
    assert first != measure_faithfulness(*model, test, 20, head=0, seed=1)
    assert set(first["methods"]) == {"mean", "head", "rollout", "relevance", "random"}
    for curve in first["curves"].values():
        # Whole at one end, gray at the other, whatever the order.
        assert curve["deletion"][0] == pytest.approx(curve["insertion"][-1], abs=1e-5)
        assert curve["deletion"][-1] == pytest.approx(curve["insertion"][0], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 5}, "no layer 5; choose from 0 to 1"),
        ({"head": 2}, "no head 2; choose from 0 to 1"),
        ({"target": "ten"}, 'no class "ten"; choose from 0, 1, 2'),
    ],
)
def test_a_wrong_choice_is_named(model, here, options, message):
    test = load_split(DataArguments(dataset="digits"), "test", image_processor())
    examples = figures.examples_from_rows(test, [0])
    with pytest.raises(UserError, match=message):
        figures.draw(
            *model, examples, here / "out", **({"layer": -1, "head": 0, "target": None} | options)
        )


def test_a_wrong_selection_is_named(model, here):
    test = load_split(DataArguments(dataset="digits"), "test", image_processor())
    (here / "notes.png").write_text("no picture")
    with pytest.raises(UserError, match=r"The image .*notes.png cannot be decoded"):
        figures.examples_from_files([here / "notes.png"])
    with pytest.raises(UserError, match="no row 360: choose from 0 to 359"):
        figures.examples_from_rows(test, [360])
    with pytest.raises(UserError, match="No image is selected"):
        figures.draw(*model, [], here, -1, 0, None)
    with pytest.raises(UserError, match="needs 1 to 360 images, not 361"):
        measure_faithfulness(*model, test, 361, head=0)


@pytest.mark.slow
def test_the_script_draws_the_typical_images_of_the_last_run(trained, here, monkeypatch, capsys):
    run_script(monkeypatch, visualize_attention.main, "--faithfulness=10")
    folder = here / "results/run/visualizations"
    assert (folder / "overview.png").exists()
    assert len(list(folder.glob("*_layers.png"))) >= 7
    found = json.loads((here / "results/run/attention_faithfulness.json").read_text())
    assert found["images"] == 10
    assert (here / "results/run/attention_faithfulness.png").exists()
    assert "than random order" in capsys.readouterr().out
    with pytest.raises(UserError, match="There is no layer 9"):
        run_script(monkeypatch, visualize_attention.main, "--layer=9")
