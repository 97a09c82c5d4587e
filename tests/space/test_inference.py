"""The Space's predictions: right maps, safe decoding, and models that cannot be loaded."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ViTModel,
    pipeline,
)

import inference
from bad_pictures import write_bad_pictures
from inference import Classifier, UserError
from pipeline.explain import attention
from samples import draw_image

CAT = next(path for path in inference.EXAMPLES if path.stem == "cat")


@pytest.fixture
def classifier(model_folder, monkeypatch) -> Classifier:
    """The untrained classifier of digits, in float32."""
    monkeypatch.setattr(inference, "choose_precision", lambda model, batches: model)
    return Classifier(str(model_folder))


@pytest.fixture
def copied(model_folder, tmp_path) -> Path:
    """A copy of its folder, to change."""
    return shutil.copytree(model_folder, tmp_path / "copied")


# --- Predictions ------------------------------------------------------------------------------


def test_one_forward_pass_gives_the_prediction_and_all_maps_but_relevance(classifier):
    calls = []
    classifier.model.register_forward_hook(lambda *_: calls.append(1))
    image = draw_image(0, (40, 30))
    prediction = classifier.predict(image)
    expected = attention.compute_maps(classifier.model, classifier.pixels(image), 3)
    calls.clear()
    for layer in range(2):
        for head in range(2):
            values = classifier.select_map(prediction, "head", layer, head)
            np.testing.assert_allclose(values, expected.heads[0, layer, head], atol=1e-6)
        values = classifier.select_map(prediction, "mean", layer)
        np.testing.assert_allclose(values, expected.heads[0, layer].mean(dim=0), atol=1e-6)
    values = classifier.select_map(prediction, "rollout")
    np.testing.assert_allclose(values, expected.rollout[0], atol=1e-6)
    assert calls == []
    for _ in range(2):
        values = classifier.select_map(prediction, "relevance", label="3")
        np.testing.assert_allclose(values, expected.relevance[0], atol=1e-6)
    assert calls == [1]  # computed when it is requested, and kept


def test_probabilities_are_those_of_the_transformers_pipeline(classifier, model_folder):
    image = draw_image(1, (50, 70))
    classify = pipeline("image-classification", model=str(model_folder))
    expected = {entry["label"]: entry["score"] for entry in classify(image, top_k=10)}
    probs = classifier.predict(image).probs
    assert probs == pytest.approx(expected, abs=1e-5)
    assert list(probs.values()) == sorted(probs.values(), reverse=True)


def test_equal_files_are_predicted_once_and_the_cache_is_bounded(classifier, tmp_path, monkeypatch):
    shutil.copyfile(CAT, tmp_path / "other_name.png")
    prediction = classifier.predict_file(CAT)
    assert classifier.predict_file(tmp_path / "other_name.png") is prediction
    draw_image(0).save(tmp_path / "other_name.png")  # the same path with other content
    assert classifier.predict_file(tmp_path / "other_name.png") is not prediction
    monkeypatch.setattr(inference, "MAX_CACHED", 2)
    for path in inference.EXAMPLES:
        classifier.predict_file(path)
    assert len(classifier.cache) <= 3


def test_a_picture_below_the_threshold_is_out_of_distribution(classifier):
    prediction = classifier.predict(draw_image(0))
    classifier.results["ood"]["threshold"] = prediction.energy + 0.1
    assert not classifier.is_in_distribution(prediction)
    classifier.results["ood"]["threshold"] = prediction.energy
    assert classifier.is_in_distribution(prediction)
    classifier.results = None  # not measured
    assert classifier.is_in_distribution(prediction)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (("mean", 2, 0, ""), "no layer 2; the layers are 0 to 1"),
        (("head", 0, 9, ""), "no head 9; the heads are 0 to 1"),
        (("relevance", 0, 0, "zebra"), 'no class "zebra"; choose from 0, 1, 2'),
        (("gradient", 0, 0, ""), 'no map "gradient"'),
        (("mean", "last", 0, ""), "must be whole numbers"),
        (("mean", 1.0, None, ""), "must be whole numbers"),
        ((["mean"], 0, 0, ""), "no map"),
    ],
)
def test_an_unknown_map_is_a_user_error(classifier, choice, message):
    prediction = classifier.predict(draw_image(0))
    with pytest.raises(UserError, match=message):
        classifier.select_map(prediction, *choice)


# --- Precision --------------------------------------------------------------------------------


def test_bfloat16_is_chosen_where_it_is_faster_and_agrees(model_folder, monkeypatch):
    model, _ = inference.load("digits", model_folder)
    batches = [torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))]
    times = iter([1.0, 2.0] * 4)  # bfloat16 comes first: the product, then the model
    monkeypatch.setattr(inference, "_seconds", lambda function: next(times))
    rounded = inference.choose_precision(model, batches)
    assert rounded.dtype == torch.bfloat16
    assert rounded.classifier.weight.dtype == torch.float32
    exact_probs = model(batches[0]).logits.softmax(dim=1)
    probs = rounded(batches[0].bfloat16()).logits.softmax(dim=1)
    assert (exact_probs - probs).abs().max() <= inference.TOLERANCE
    monkeypatch.setattr(inference, "TOLERANCE", 0)
    assert inference.choose_precision(model, batches) is model


def test_a_model_is_not_tried_in_bfloat16_where_a_small_product_is_slower(monkeypatch):
    times = iter([2.0, 1.0])
    monkeypatch.setattr(inference, "_seconds", lambda function: next(times))
    model = torch.nn.Linear(1, 1)
    model.dtype = torch.float32
    assert inference.choose_precision(model, []) is model


def test_threads_are_limited_to_the_cores_of_the_container(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("CPU_CORES", "1")
    inference.limit_threads()
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


# --- Pictures ---------------------------------------------------------------------------------


def test_a_bad_picture_is_a_user_error(classifier, tmp_path):
    for path, message in write_bad_pictures(tmp_path).items():
        with pytest.raises(UserError, match=message):
            classifier.predict_file(path)
    with open(tmp_path / "heavy.png", "wb") as file:
        file.truncate(30 * 2**20)
    with pytest.raises(UserError, match="more than 20 MB"):
        classifier.predict_file(tmp_path / "heavy.png")
    with pytest.raises(UserError, match="no longer on the server"):
        classifier.predict_file(tmp_path / "deleted.png")


def open_saved(image: Image.Image, file_format: str = "PNG", **options) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    opened = inference.open_picture(file.getvalue())
    assert opened.mode == "RGB"
    return np.asarray(opened)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "LA", "P", "1"])
def test_other_modes_are_converted_as_pillow_does(mode):
    image = draw_image(0, (20, 16))
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image = image.convert(mode)
    opened = open_saved(image, "TIFF" if mode == "CMYK" else "PNG")
    assert np.array_equal(opened, image.convert("RGB"))


def test_16_bit_gray_is_scaled_to_8_bits():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    assert np.array_equal(open_saved(Image.fromarray(ramp))[..., 0], ramp >> 8)


def test_exif_orientation_is_applied_and_an_animations_first_frame_is_used():
    image, other = draw_image(0, (20, 16)), draw_image(1, (20, 16))
    exif = Image.Exif()
    exif[274] = 6  # rotate by 90 degrees
    rotated = image.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(open_saved(image, exif=exif), rotated)
    assert np.array_equal(open_saved(image, save_all=True, append_images=[other]), image)


# --- Models -----------------------------------------------------------------------------------


def test_results_count_only_for_the_files_they_were_measured_on(copied, monkeypatch):
    monkeypatch.chdir(copied.parent)
    results = json.loads((copied / inference.RESULTS).read_text())
    assert inference.read_results(copied) == results
    Path("results/copied").mkdir(parents=True)
    (copied / inference.RESULTS).rename(Path("results/copied") / inference.RESULTS)
    assert inference.read_results(copied) == results  # of a run in this checkout
    (copied / "config.json").write_text((copied / "config.json").read_text() + "\n")
    assert inference.read_results(copied) is None


@pytest.mark.parametrize("content", ["", "[1]", '{"model": null}', "\x00"])
def test_broken_results_count_as_none(copied, content):
    (copied / inference.RESULTS).write_text(content)
    assert inference.read_results(copied) is None


def change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


def break_model(folder: Path, kind: str) -> None:
    names = {str(number): str(number) for number in range(10)}
    if kind == "no processor":
        (folder / "preprocessor_config.json").unlink()
    elif kind == "shortest edge":
        processor = json.loads((folder / "preprocessor_config.json").read_text())
        processor["size"] = {"shortest_edge": 32}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    elif kind == "cut weights":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[:5000])
    elif kind == "duplicate labels":
        change_config(folder, id2label=names | {"3": "4"})
    elif kind == "gap in labels":
        change_config(folder, id2label={**names, "10": "10"})
    elif kind == "unknown type":
        change_config(folder, model_type="nothing")
    elif kind == "backbone":
        model = AutoModelForImageClassification.from_pretrained(folder)
        ViTModel(model.config, add_pooling_layer=False).save_pretrained(folder)
    elif kind == "no attention":
        config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
        ConvNextForImageClassification(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no processor", r"incomplete: it has no preprocessor_config\.json"),
        ("shortest edge", "cannot be loaded|does not give a width"),
        ("cut weights", "cannot be loaded"),
        ("duplicate labels", "not a fine-tuned classifier with named classes"),
        ("gap in labels", "cannot be loaded"),
        ("unknown type", "cannot be loaded"),
        ("backbone", "not a fine-tuned classifier"),
        ("no attention", "ConvNextForImageClassification has no global attention"),
    ],
)
def test_a_broken_model_is_a_user_error(copied, kind, message):
    break_model(copied, kind)
    with pytest.raises(UserError, match=message) as error:
        Classifier(str(copied))
    assert "\n" not in str(error.value)


@pytest.fixture
def published(hub_server, model_folder, tmp_path, monkeypatch) -> str:
    """The commit of the model `me/digits` on the local Hub, of which nothing is cached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    local_hub = pytest.importorskip("local_hub")
    repository = local_hub.Repository(hub_server.root, "models", "me/digits")
    repository.create()
    repository.add_folder(model_folder)
    return repository.resolve("main")


def test_a_model_is_downloaded_at_its_commit(published):
    folder, commit = inference.download("me/digits", published)
    assert commit == published
    assert {file.name for file in folder.iterdir()} == {*inference.FILES, inference.RESULTS}
    assert inference.download("me/digits")[1] == published


def test_without_the_hub_the_cached_copy_is_used(published, monkeypatch):
    inference.download("me/digits")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    assert inference.download("me/digits", published)[1] == published
    assert inference.download("me/digits")[1] == published
    with pytest.raises(UserError, match='no cached model "me/other" .* and the Hub .* not answer'):
        inference.download("me/other", published)


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("me/nothing", None, 'no public model "me/nothing" on the Hub at'),
        ("me/digits", "gone", '"me/digits" with the revision "gone"'),
        ("me/digits", "0" * 40, '"me/digits" with the revision "0000'),
        ("no name/at/all", None, 'no public model "no name/at/all"'),
    ],
)
def test_a_missing_model_is_a_user_error(published, name, revision, message):
    with pytest.raises(UserError, match=message):
        inference.download(name, revision)
