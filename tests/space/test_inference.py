"""The Space: what it makes of a picture, of a bad one, and of a model that can't be had."""

import json
import shutil
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version as installed
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import gradio as gr
import numpy as np
import pytest
import torch
from conftest import RESULTS, draw_image
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import app
import inference
from inference import Classifier, Refusal
from pipeline import attention
from pipeline.data import open_image

CAT = str(inference.EXAMPLES[3])


@pytest.fixture
def classifier(measured, monkeypatch) -> Classifier:
    """The untrained model of digits in `models/tiny`, in float32."""
    monkeypatch.setattr(inference, "quicker", lambda model, batches: model)
    return Classifier("models/tiny")


# --- An answer -----------------------------------------------------------------------------


def test_one_forward_pass_gives_the_answer_and_all_maps_but_relevance(classifier):
    calls = []
    classifier.model.register_forward_hook(lambda *_: calls.append(1))
    image = draw_image(0, (40, 30))
    answer = classifier.answer(image)
    for layer in range(2):
        for head in range(2):
            classifier.map(answer, "head", layer, head)
        classifier.map(answer, "mean", layer)
    found = classifier.map(answer, "rollout")
    assert len(calls) == 1
    relevance = classifier.map(answer, "relevance", label="3")
    classifier.map(answer, "relevance", label="3")
    assert len(calls) == 2  # computed when asked for, and kept
    expected = attention.explain(classifier.model, classifier.pixels(image), 3)
    np.testing.assert_allclose(found, expected.rollout[0], atol=1e-6)
    np.testing.assert_allclose(relevance, expected.relevance[0], atol=1e-6)
    np.testing.assert_allclose(answer.probabilities, expected.logits.softmax(1)[0], atol=1e-6)


def test_it_answers_as_the_pipeline_of_transformers_does(classifier, here):
    from transformers import pipeline

    classify = pipeline("image-classification", model="models/tiny")
    image = draw_image(1, (50, 70))
    for entry in classify(image):
        share = app.confidences(classifier, classifier.answer(image))[entry["label"]]
        assert share == pytest.approx(entry["score"], abs=1e-5)


def test_a_picture_below_the_threshold_is_answered_with_doubt(classifier):
    answer = classifier.answer(draw_image(0))
    classifier.results["familiarity"]["threshold"] = answer.energy + 0.1
    assert app.DOUBT in app.bars(classifier, answer)
    classifier.results["familiarity"]["threshold"] = answer.energy - 0.1
    assert app.DOUBT not in app.bars(classifier, answer)
    classifier.results = None  # not measured
    assert classifier.familiar(answer)


def test_the_page_says_what_was_measured_of_these_weights_only(classifier, here):
    assert (
        classifier.results["accuracy"]
        == json.loads((here / "results" / RESULTS).read_text())["accuracy"]
    )
    assert f"{app.percent(classifier.results['accuracy'], 2)} of 360 images" in app.about(
        classifier
    )
    config = here / "models/tiny/config.json"
    config.write_text(config.read_text() + "\n")
    other = Classifier("models/tiny")
    assert other.results is None
    assert "was not published" in app.about(other)


@pytest.mark.parametrize(
    ("seconds", "moved", "dtype"),
    [
        ((2.0, 1.0), 0.01, torch.bfloat16),
        ((1.0, 2.0), 0.01, torch.float32),
        ((2.0, 1.0), 0.03, torch.float32),
    ],
    ids=["quicker", "slower", "quicker, but other answers"],
)
def test_bfloat16_is_taken_where_it_is_quicker_and_agrees(
    measured, monkeypatch, seconds, moved, dtype
):
    def timed(model, batches):
        rounded = model.dtype == torch.bfloat16
        return torch.tensor([[0.9, 0.1]]) - moved * rounded, seconds[rounded]

    model, _ = inference.load("models/tiny", Path("models/tiny"))
    monkeypatch.setattr(inference, "_timed", timed)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})
    assert inference.quicker(model, []).dtype == dtype
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert inference.quicker(model, []) is model


def test_bfloat16_gives_the_same_answers(measured, monkeypatch):
    def timed(model, batches, original=inference._timed):
        return original(model, batches)[0], 1.0 if model.dtype == torch.bfloat16 else 2.0

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})
    monkeypatch.setattr(inference, "_timed", timed)
    rounded = Classifier("models/tiny")
    assert rounded.precision == "bfloat16"
    monkeypatch.setattr(inference, "quicker", lambda model, batches: model)
    exact = Classifier("models/tiny")
    for path in inference.EXAMPLES:
        image = inference.open_picture(path)
        found, expected = rounded.answer(image), exact.answer(image)
        assert np.abs(found.probabilities - expected.probabilities).max() < inference.AGREES
        rounded.map(found, "relevance")


# --- A picture -----------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it has this size, of a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def bad_pictures(folder: Path) -> dict[str, str]:
    """Files that can't be answered, and what is said of them."""
    (folder / "text.png").write_text("This is no picture.")
    (folder / "page.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "empty.jpg").touch()
    draw_image(0, (64, 64)).save(folder / "cut.jpg")
    whole = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    draw_image(0, (1, 1)).save(folder / "dot.png")
    draw_image(0, (1, 5000)).save(folder / "line.png")
    (folder / "large.png").write_bytes(png_of(8000, 8000))
    (folder / "bomb.png").write_bytes(png_of(60000, 60000))
    return {
        "text.png": "no picture that can be read",
        "page.svg": "no picture that can be read",
        "empty.jpg": "no picture that can be read",
        "cut.jpg": "damaged, or cut off",
        "dot.png": "1 x 1 pixels: it needs 8 a side",
        "line.png": "1 x 5000 pixels: it needs 8 a side",
        "large.png": "64 million pixels; at most 50 million",
        "bomb.png": "more than 50 million pixels",
    }


def test_a_bad_picture_is_refused_in_a_sentence(tmp_path):
    for name, sentence in bad_pictures(tmp_path).items():
        with pytest.raises(Refusal, match=sentence):
            inference.open_picture(tmp_path / name)
    shutil.copyfile(CAT, tmp_path / "heavy.png")
    with open(tmp_path / "heavy.png", "ab") as file:
        file.truncate(30 * 2**20)
    with pytest.raises(Refusal, match="30 MB; at most 20 MB"):
        inference.open_picture(tmp_path / "heavy.png")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "LA", "P", "1"])
def test_a_picture_is_opened_as_the_training_images_were(tmp_path, mode):
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    image = draw_image(0, (20, 16))
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.convert(mode).save(path)
    opened = inference.open_picture(path)
    expected = open_image({"bytes": None, "path": str(path)}, "train", 0)
    assert opened.mode == "RGB"
    assert np.array_equal(opened, expected)


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    opened = np.asarray(inference.open_picture(tmp_path / "deep.png"))
    assert np.array_equal(opened[..., 0], ramp >> 8)


def test_a_rotated_picture_is_turned_upright_and_an_animation_stands_still(tmp_path):
    image, other = draw_image(0, (20, 16)), draw_image(1, (20, 16))
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(
        inference.open_picture(tmp_path / "turned.png"), image.transpose(Image.Transpose.ROTATE_270)
    )
    image.save(tmp_path / "moving.png", save_all=True, append_images=[other])
    assert np.array_equal(inference.open_picture(tmp_path / "moving.png"), image)


# --- A model that can't be had ---------------------------------------------------------------


@pytest.fixture
def published(hub_server, measured_once) -> str:
    """The commit of the model `me/digits` on the Hub."""
    import local_hub

    repo = local_hub.Repo(hub_server.root, "models", "me/digits")
    repo.create({"private": False, "sdk": None, "variables": {}})
    repo.add_folder(measured_once / "models/tiny")
    return repo.revision("main")


def test_a_model_is_pulled_by_its_commit(published, here):
    folder, commit = inference.pull("me/digits", published)
    assert commit == published
    assert {f.name for f in folder.iterdir()} == set(inference.FILES)
    assert inference.pull("me/digits")[1] == published


def test_with_the_hub_down_a_kept_copy_does(published, hub_server, here, monkeypatch):
    inference.pull("me/digits", published)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's tries
    assert inference.pull("me/digits", published)[1] == published
    assert inference.pull("me/digits")[1] == published
    with pytest.raises(Refusal, match=r'"me/other" can\'t be fetched .* no copy of it is kept'):
        inference.pull("me/other", published)


@pytest.mark.parametrize(
    ("name", "revision", "sentence"),
    [
        ("me/nothing", None, 'There is no model "me/nothing" on the Hub at'),
        ("me/digits", "gone", '"me/digits" has no revision "gone"'),
        ("me/digits", "0" * 40, '"me/digits" has no revision "0000'),
        ("no name/at/all", None, 'There is no model "no name/at/all"'),
    ],
)
def test_a_model_that_is_not_there_is_named(published, here, name, revision, sentence):
    with pytest.raises(Refusal, match=sentence):
        inference.pull(name, revision)


def test_a_model_that_is_not_whole_is_named(measured, here):
    (here / "models/tiny/preprocessor_config.json").unlink()
    with pytest.raises(Refusal, match=r"not whole: it has no preprocessor_config\.json"):
        Classifier("models/tiny")


def test_without_a_model_the_page_comes_up_and_says_why(monkeypatch, here, hub_server):
    monkeypatch.setenv("MODEL_ID", "me/nothing")
    page = app.build(*app.open_classifier())
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        client = Client(url, verbose=False)
        assert "There is no model &quot;me/nothing&quot;" in json.dumps(client.config)
        with pytest.raises(AppError, match='There is no model "me/nothing"'):
            client.predict(handle_file(CAT), api_name="/classify")
    finally:
        page.close()


# --- The endpoints, of a Space that runs alone -------------------------------------------------


@pytest.fixture(scope="module")
def client(space) -> Client:
    return Client(space, verbose=False)


def posted(space: str, value) -> str:
    """What /classify answers to a value sent as it stands, with no client that would upload it."""
    address = f"{space}/gradio_api/call/classify"
    headers = {"Content-Type": "application/json"}
    request = Request(address, json.dumps({"data": [value]}).encode(), headers)
    event = json.load(urlopen(request))["event_id"]
    return urlopen(f"{address}/{event}").read().decode()


def test_the_endpoints_are_named_typed_and_described(client):
    found = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(found) == {"/classify", "/explain"}
    parameters = {p["parameter_name"]: p for p in found["/explain"]["parameters"]}
    assert list(parameters) == ["image", "method", "layer", "head", "label"]
    assert parameters["layer"]["python_type"]["type"] == "int"
    assert parameters["method"]["type"]["enum"] == list(attention.METHODS)
    assert found["/classify"]["description"].startswith("Which of the model's classes")


def test_a_picture_is_classified_and_explained(client, classifier):
    answer = classifier.answer(inference.open_picture(CAT))
    classes, doubt = client.predict(handle_file(CAT), api_name="/classify")
    shares = {c["label"]: c["confidence"] for c in classes["confidences"]}
    assert shares == pytest.approx(app.confidences(classifier, answer), abs=inference.AGREES)
    assert doubt in ("", app.DOUBT)
    overlay, values, classes = client.predict(
        handle_file(CAT), "head", 1, 0, "", api_name="/explain"
    )
    assert Image.open(overlay).size == (224, 224)
    expected = classifier.map(answer, "head", 1, 0)
    np.testing.assert_allclose(values, expected, atol=0.02)
    assert classes["label"] == max(shares, key=shares.get)


def test_a_bad_request_is_answered_in_a_sentence_and_the_next_one_works(client, tmp_path):
    bad = {str(tmp_path / name): says for name, says in bad_pictures(tmp_path).items()}
    for path, sentence in bad.items():
        with pytest.raises(AppError, match=sentence):
            client.predict(handle_file(path), api_name="/classify")
    for arguments, sentence in {
        ("mean", 9, 0, ""): "no layer 9: the model has 2",
        ("head", 0, 9, ""): "no head 9: a layer has 2",
        ("relevance", 0, 0, "zebra"): 'no class "zebra"; there are 0, 1, 2',
        ("sense", 0, 0, ""): "sense",
        ("mean", "last", 0, ""): "not of the types",
    }.items():
        with pytest.raises(AppError, match=sentence):
            client.predict(handle_file(CAT), *arguments, api_name="/explain")
    with open(tmp_path / "heavy.png", "wb") as file:
        file.truncate(30 * 2**20)
    with pytest.raises(ValueError, match="exceeds the maximum file size"):
        client.predict(handle_file(str(tmp_path / "heavy.png")), api_name="/classify")
    with pytest.raises(AppError, match="There is no picture"):
        client.predict(None, api_name="/classify")
    assert client.predict(handle_file(CAT), api_name="/classify")[0]["label"]


def test_a_path_or_an_address_is_neither_read_nor_fetched(space):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    trap = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=trap.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{trap.server_port}/picture.png"
    meta = {"meta": {"_type": "gradio.FileData"}}
    for value in (
        CAT,
        address,
        {"path": CAT} | meta,
        {"path": CAT},
        {"path": address} | meta,
        {"path": None, "url": address} | meta,
        {"path": "../../../../etc/passwd"} | meta,
    ):
        assert "Upload the picture: a path or an address is not read" in posted(space, value)
    for file in (CAT, "/etc/passwd", "app.py"):
        with pytest.raises(HTTPError, match="403"):
            urlopen(f"{space}/gradio_api/file={file}")
    trap.shutdown()
    trap.server_close()
    assert asked == []


def test_what_comes_at_once_is_all_answered(client):
    jobs = [client.submit(handle_file(p), api_name="/classify") for p in inference.EXAMPLES * 2]
    answers = [job.result(timeout=60)[0]["label"] for job in jobs]
    half = len(inference.EXAMPLES)
    assert answers[:half] == answers[half:]


def test_what_is_pinned_is_what_is_tested():
    for line in (Path(app.HERE) / "requirements.txt").read_text().splitlines():
        name, _, version = line.split("#")[0].strip().partition("==")
        if name:
            assert installed(name).split("+")[0] == version
    assert f"sdk_version: {gr.__version__}\n" in (Path(app.HERE) / "README.md").read_text()
