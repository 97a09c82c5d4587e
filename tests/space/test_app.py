"""The Space's wording and endpoints, and how it starts and ends."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import gradio as gr
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import inference
import wording
from bad_pictures import write_bad_pictures
from inference import Classifier
from pipeline.explain import attention
from samples import draw_image

SPACE = Path(inference.__file__).parent
CAT = str(SPACE / "examples/cat.png")


@pytest.fixture(scope="module")
def classifier(cifar_folder) -> Classifier:
    """The model of the Space that the tests talk to."""
    return Classifier(str(cifar_folder))


# --- Wording ----------------------------------------------------------------------------------


def test_confidence_is_never_shown_as_certainty(classifier):
    prediction = classifier.predict(draw_image(0))
    texts = {0.973: "97.3", 0.9994: "more than 99.9", 1.0: "more than 99.9"}
    for probability, text in texts.items():
        prediction.probs = {"cat": probability, "dog": 1 - probability}
        assert wording.answer(classifier, prediction) == f"cat, {text}\N{NO-BREAK SPACE}% confident"


def test_an_out_of_distribution_picture_gets_a_warning(classifier, monkeypatch):
    prediction = classifier.predict(draw_image(0))
    monkeypatch.setitem(classifier.results["ood"], "threshold", prediction.energy + 1)
    assert wording.answer(classifier, prediction).startswith("Probably none of its classes")
    monkeypatch.setitem(classifier.results["ood"], "threshold", prediction.energy - 1)
    assert "none of its classes" not in wording.answer(classifier, prediction)


def test_the_page_names_the_dataset_the_model_and_what_was_measured(classifier, monkeypatch):
    assert wording.page_title(classifier) == "CIFAR-10 classifier with attention maps"
    about = wording.about(classifier).replace("\N{NO-BREAK SPACE}", " ")
    assert "**Accuracy 10.6 %** on 360 test images (95 % interval 7.8 % to 14.2 %)." in about
    assert "2.0 % of handwritten digits and 8.1 % of photographs" in about
    assert "airplane, automobile" in about
    monkeypatch.setattr(classifier, "name", "me/cifar")
    monkeypatch.setattr(classifier, "revision", "0123456789")
    assert "[me/cifar](https://" in wording.link(classifier)
    assert "/me/cifar/tree/0123456789) at revision `0123456`" in wording.link(classifier)
    monkeypatch.setattr(classifier, "results", None)
    monkeypatch.setattr(classifier, "labels", [f"class {n}" for n in range(1000)])
    assert wording.page_title(classifier) == "Image classifier with attention maps"
    assert "was not published" in wording.about(classifier)
    assert "and 980 more" in wording.about(classifier)


def test_sentences_are_escaped_in_html():
    assert wording.status("<b>cat</b>") == '<p role="status">&lt;b&gt;cat&lt;/b&gt;</p>'


def example_names(demo: gr.Blocks) -> list[str]:
    samples = next(b for b in demo.blocks.values() if getattr(b, "elem_id", "") == "examples")
    return [image["caption"] for image in samples.value or []]


def test_examples_are_shown_only_to_a_model_that_knows_them(app, model_folder, classifier):
    assert example_names(app.demo) == [path.stem for path in inference.EXAMPLES]
    assert example_names(app.build(Classifier(str(model_folder)))) == []  # digits
    pets = Classifier(str(model_folder))
    pets.labels[:2] = ["cat", "dog"]
    assert example_names(app.build(pets)) == ["cat", "dog"]


# --- Start ------------------------------------------------------------------------------------


def run_app(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run `python app.py` of this checkout in a folder, without a Hub."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("MODEL_ID", "SPACE_ID")}
    environment = inherited | {"HF_HUB_OFFLINE": "1"} | variables
    command = [sys.executable, SPACE / "app.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MODEL_ID": ""}, "There is no model: train one, or name one in the variable MODEL_ID."),
        ({"MODEL_ID": "models/typo"}, 'There is no cached model "models/typo"'),
        ({"MODEL_ID": "a/b/typo"}, 'There is no public model "a/b/typo"'),
    ],
)
def test_without_a_model_the_app_ends_with_a_sentence_and_status_1(tmp_path, variables, message):
    ended = run_app(tmp_path, **variables)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"Error: {message}")
    assert len(ended.stderr.strip().splitlines()) == 1


def test_on_the_hub_the_page_comes_up_and_says_why_there_is_no_model(app, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "me/space")
    monkeypatch.setenv("MODEL_ID", "a/b/typo")
    demo = app.build(*app.open_classifier())
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True)
    try:
        config = json.dumps(Client(url, verbose=False).config)
        assert "There is no public model &quot;a/b/typo&quot;" in config
    finally:
        demo.close()


def test_the_default_model_is_the_last_run(app, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL_ID", "")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/digits").symlink_to(model_folder)
    monkeypatch.setattr("pipeline.runs.last_run", lambda: "models/digits")
    classifier, problem = app.open_classifier()
    assert classifier.name == "models/digits"
    assert problem == ""


def test_the_pinned_versions_are_the_tested_ones():
    for line in (SPACE / "requirements.txt").read_text().splitlines():
        name, _, pinned = line.split("#")[0].strip().partition("==")
        if name:
            assert version(name).split("+")[0] == pinned
    assert f"sdk_version: {gr.__version__}\n" in (SPACE / "README.md").read_text()


# --- Endpoints --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(space_url) -> Client:
    return Client(space_url, verbose=False)


def post(space_url: str, endpoint: str, data: list) -> str:
    """Return the reply to data that is sent as it is, where a client would upload files."""
    address = f"{space_url}/gradio_api/call/{endpoint}"
    headers = {"Content-Type": "application/json"}
    request = Request(address, json.dumps({"data": data}).encode(), headers)
    event = json.load(urlopen(request))["event_id"]
    return urlopen(f"{address}/{event}").read().decode()


@pytest.mark.slow
def test_the_endpoints_are_typed_and_described(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(endpoints) == {"/classify", "/explain"}
    parameters = {p["parameter_name"]: p for p in endpoints["/explain"]["parameters"]}
    assert list(parameters) == ["image", "method", "layer", "head", "label"]
    assert parameters["image"]["python_type"]["type"] == "filepath"
    assert parameters["layer"]["python_type"]["type"] == "int"
    assert parameters["method"]["type"]["enum"] == list(attention.METHODS)
    assert endpoints["/classify"]["description"].startswith("Return the probability of each")


@pytest.mark.slow
def test_a_picture_is_classified_and_explained(client, classifier):
    prediction = classifier.predict_file(CAT)
    probs, warning = client.predict(handle_file(CAT), api_name="/classify")
    assert probs == pytest.approx(prediction.probs, abs=inference.TOLERANCE)
    assert warning in ("", wording.OOD)
    overlay, values, probs = client.predict(
        handle_file(CAT), method="head", layer=1, head=0, api_name="/explain"
    )
    expected = classifier.select_map(prediction, "head", 1, 0)
    np.testing.assert_allclose(values, expected, atol=0.02)
    drawn = np.asarray(attention.overlay(prediction.picture, expected), dtype=float)
    assert np.abs(np.asarray(Image.open(overlay), dtype=float) - drawn).mean() < 3
    assert max(probs, key=probs.get) == next(iter(prediction.probs))


@pytest.mark.slow
def test_a_bad_request_is_answered_in_a_sentence_and_the_next_one_works(client, tmp_path):
    for path, message in write_bad_pictures(tmp_path).items():
        with pytest.raises(AppError, match=message):
            client.predict(handle_file(str(path)), api_name="/classify")
    for choice, message in {
        ("mean", 9, 0, ""): "no layer 9; the layers are 0 to 1",
        ("head", 0, 9, ""): "no head 9; the heads are 0 to 1",
        ("relevance", 0, 0, "zebra"): 'no class "zebra"; choose from airplane',
        ("gradient", 0, 0, ""): 'no map "gradient"',
        ("mean", "last", 0, ""): "must be whole numbers",
    }.items():
        with pytest.raises(AppError, match=message):
            client.predict(handle_file(CAT), *choice, api_name="/explain")
    with open(tmp_path / "heavy.png", "wb") as file:
        file.truncate(30 * 2**20)
    with pytest.raises(ValueError, match="exceeds the maximum file size"):
        client.predict(handle_file(str(tmp_path / "heavy.png")), api_name="/classify")
    with pytest.raises(AppError, match="Upload a picture"):
        client.predict(None, api_name="/classify")
    assert client.predict(handle_file(CAT), api_name="/classify")[0]


@pytest.mark.slow
def test_an_address_or_a_path_is_neither_fetched_nor_read(space_url):
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/picture.png"
    meta = {"meta": {"_type": "gradio.FileData"}}
    for value in (
        CAT,
        address,
        {"path": CAT} | meta,
        {"path": CAT},
        {"path": address} | meta,
        {"path": address, "url": address} | meta,
        {"path": None, "url": address} | meta,
        {"path": "../../../../etc/passwd"} | meta,
        {"path": "bad\0path"} | meta,
        [{"path": address} | meta],
        {"nested": {"path": address} | meta},
        7,
    ):
        reply = post(space_url, "classify", [value])
        assert "event: error" in reply
        assert "Upload the picture as a file" in reply or "not those that the API page" in reply
    assert "not those that the API page" in post(space_url, "classify", [])
    for file in (CAT, "/etc/passwd", "app.py"):
        with pytest.raises(HTTPError, match="403"):
            urlopen(f"{space_url}/gradio_api/file={file}")
    server.shutdown()
    server.server_close()
    assert requests == []


@pytest.mark.slow
def test_simultaneous_requests_are_all_answered_in_order(client):
    examples = [str(path) for path in inference.EXAMPLES]
    jobs = [client.submit(handle_file(path), api_name="/classify") for path in examples * 2]
    answers = [job.result(timeout=60)[0] for job in jobs]
    assert answers[: len(examples)] == answers[len(examples) :]
