"""The Space's wording and endpoints, and how it starts and ends."""

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import gradio as gr
import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import inference
import loading
import wording
from bad_pictures import write_bad_pictures
from inference import Classifier
from pipeline import runs
from pipeline.explain import attention
from samples import draw_image
from space_fixtures import stage_space, start_space

SPACE = Path(inference.__file__).parent
CAT = str(SPACE / "examples/cat.png")


@pytest.fixture(scope="module")
def classifier(cifar_folder) -> Classifier:
    """The model of the Space that the tests talk to, which computes in float32 too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPACES_ZERO_GPU", "1")
        return Classifier(str(cifar_folder))


@pytest.fixture
def copied(model_folder, tmp_path, monkeypatch) -> Path:
    """A copy of the folder of the classifier of digits, to change."""
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    return shutil.copytree(model_folder, tmp_path / "copied")


# --- Wording ----------------------------------------------------------------------------------


def test_confidence_is_never_shown_as_certainty(classifier):
    prediction = classifier.predict(draw_image(0))
    texts = {0.973: "97.3", 0.9994: "more than 99.9", 1.0: "more than 99.9"}
    for probability, text in texts.items():
        prediction.probs = {"cat": probability, "dog": 1 - probability}
        assert wording.answer(classifier, prediction) == f"cat, {text}\N{NO-BREAK SPACE}% confident"


def test_an_out_of_distribution_picture_gets_a_warning(classifier, monkeypatch):
    prediction = classifier.predict(draw_image(0))
    monkeypatch.setattr(classifier, "is_ood", lambda prediction: True)
    assert wording.answer(classifier, prediction).startswith("Probably none of its classes")
    monkeypatch.setattr(classifier, "is_ood", lambda prediction: False)
    assert "none of its classes" not in wording.answer(classifier, prediction)


def test_the_page_names_the_model_and_what_was_measured(app, classifier, monkeypatch):
    assert app.demo.title == "CIFAR-10 classifier with attention maps"
    footer = wording.render("footer.md", classifier).replace("\N{NO-BREAK SPACE}", " ")
    assert "**Accuracy 10.6 %** on 360 test images (95 % interval 7.8 % to 14.2 %)." in footer
    assert "airplane, automobile" in footer
    assert "in float32" in footer
    assert "faithful" not in footer
    monkeypatch.setattr(classifier, "faithfulness", {"images": 200})
    assert "most faithful on 200 images" in wording.render("footer.md", classifier)
    monkeypatch.setenv("SPACE_ID", "me/look")
    monkeypatch.setattr(classifier, "name", "me/cifar")
    monkeypatch.setattr(classifier, "revision", "0123456789")
    header = wording.render("header.md", classifier)
    assert "[me/cifar](https://" in header
    assert "/me/cifar/tree/0123456789) at revision `0123456`" in header
    assert "/spaces/me/look/tree/main)" in header


def test_a_model_without_results_and_with_1000_classes_has_a_page(app, classifier, monkeypatch):
    monkeypatch.setattr(classifier, "results", None)
    monkeypatch.setattr(classifier, "labels", [f"class {n}" for n in range(1000)])
    assert app.build(classifier).title == "Image classifier with attention maps"
    footer = wording.render("footer.md", classifier)
    assert "was not published" in footer
    assert "and 980 more" in footer


def example_names(demo: gr.Blocks) -> list[str]:
    samples = next(b for b in demo.blocks.values() if getattr(b, "elem_id", "") == "examples")
    return [image["caption"] for image in samples.value or []]


def test_examples_are_shown_only_to_a_model_that_knows_them(app, copied, classifier):
    eight = {path.stem for path in inference.EXAMPLES} - {"apple", "mountain"}
    assert set(example_names(app.demo)) == eight
    assert example_names(app.build(Classifier(str(copied)))) == []  # digits
    (copied / "examples").mkdir()
    draw_image(0).save(copied / "examples/00012.jpg")  # published with the model
    pets = Classifier(str(copied))
    assert example_names(app.build(pets)) == ["00012"]


# --- Start ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_a_model_the_app_ends_with_a_sentence_and_status_1(tmp_path):
    inherited = {k: v for k, v in os.environ.items() if k not in ("MODEL_ID", "SPACE_ID")}
    command = [sys.executable, SPACE / "app.py"]
    ended = subprocess.run(command, cwd=tmp_path, env=inherited, capture_output=True, text=True)
    assert ended.returncode == 1
    message = "There is no model: train one, or set the variable MODEL_ID."
    assert ended.stderr.strip() == f"Error: {message}"


def test_a_model_that_does_not_exist_is_named(app, monkeypatch):
    monkeypatch.delenv("SPACE_ID", raising=False)
    monkeypatch.setenv("MODEL_ID", "models/typo")
    with pytest.raises(SystemExit, match='^Error: There is no cached model "models/typo"') as ended:
        app.open_page()
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("me/shown", "a" * 40)),
        ({"MODEL_ID": "me/other@v1"}, ("me/other", "v1")),
        ({"MODEL_ID": "me/other"}, ("me/other", None)),
        ({"MODEL_ID": "folder@home"}, ("folder@home", None)),
        ({"MODEL_ID": "me/other", "SPACE_ID": "me/look"}, ("me/shown", "a" * 40)),
    ],
)
def test_the_commit_of_the_space_names_the_model_and_elsewhere_a_variable_does(
    here, monkeypatch, environment, expected
):
    (here / "folder@home").mkdir()
    (here / "model.json").write_text(json.dumps({"model": "me/shown", "revision": "a" * 40}))
    monkeypatch.setattr(loading, "SHOWN", here / "model.json")
    monkeypatch.delenv("MODEL_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert loading.choose_model() == expected


def test_the_default_model_is_the_last_run(here, monkeypatch):
    monkeypatch.setenv("MODEL_ID", "")
    for second, run in enumerate(("second", "first", "last")):
        (here / "models" / run).mkdir(parents=True)
        (here / "models" / run / "training.json").touch()
        os.utime(here / "models" / run / "training.json", (second, second))
    assert loading.choose_model() == ("models/last", None) == (runs.last_run(), None)


@pytest.mark.slow
def test_on_the_hub_the_page_says_why_there_is_no_model_and_tries_again(model_folder, tmp_path):
    folder = stage_space(tmp_path / "app")
    app = (folder / "app.py").read_text()
    (folder / "app.py").write_text(app.replace("time.sleep(30)", "time.sleep(1)"))
    (folder / "model.json").write_text(json.dumps({"model": "later", "revision": None}))
    url, process = start_space(folder, {"SPACE_ID": "me/look"})
    try:
        page = urlopen(url).read().decode()
        assert "There is no cached model" in page
        assert "http-equiv" in page  # a browser loads the page again
        shutil.copytree(model_folder, folder / "later")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and "Digits classifier" not in page:
            time.sleep(0.2)
            with contextlib.suppress(OSError):  # between the two pages
                page = urlopen(url).read().decode()
        assert "Digits classifier" in page
        assert "http-equiv" not in page
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="they are for Python 3.11")
def test_the_pinned_versions_are_the_tested_ones():
    for line in (SPACE / "requirements.txt").read_text().splitlines():
        name, _, pinned = line.split("#")[0].strip().partition("==")
        if pinned:
            assert version(name.split("[")[0]).split("+")[0] == pinned.split("+")[0]
    assert f"sdk_version: {gr.__version__}\n" in (SPACE / "README.md").read_text()


# --- Endpoints --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(space_url) -> Client:
    return Client(space_url, verbose=False)


def post(space_url: str, endpoint: str, body: dict) -> str:
    """Return the reply to what is sent as it is, where a client would upload files."""
    address = f"{space_url}/gradio_api/call/{endpoint}"
    headers = {"Content-Type": "application/json"}
    request = Request(address, json.dumps(body).encode(), headers)
    event = json.load(urlopen(request))["event_id"]
    return urlopen(f"{address.replace('/v2', '')}/{event}").read().decode()


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
def test_the_snippet_of_the_api_page_works(space_url, client, here):
    """With a file of the snippet's name, in the folder that it runs in."""
    shutil.copy(CAT, here)
    for endpoint in json.load(urlopen(f"{space_url}/gradio_api/info"))["named_endpoints"].values():
        snippet = endpoint["code_snippets"]["python"]
        assert "image=handle_file('cat.png')" in snippet
        command = [sys.executable, "-c", snippet]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "'airplane': 0." in printed


@pytest.mark.slow
def test_the_endpoints_are_tools_of_an_mcp_server(space_url, classifier):
    mcp = pytest.importorskip("mcp")
    http = pytest.importorskip("mcp.client.streamable_http")

    async def talk():
        async with (
            http.streamable_http_client(f"{space_url}/gradio_api/mcp/") as (read, write, _),
            mcp.ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            image = "data:image/png;base64," + base64.b64encode(Path(CAT).read_bytes()).decode()
            address = "http://127.0.0.1:9/cat.png"
            calls = {"image": image}, {"image": address}, {"image": image, "layer": 99}, {}
            return tools, [await session.call_tool("explain", call) for call in calls]

    tools, (answer, fetched, no_layer, empty) = asyncio.run(talk())
    assert tools.keys() == {"classify", "explain"}
    assert tools["classify"].description.startswith("Return the probability of each class")
    parameters = tools["explain"].inputSchema["properties"]
    assert parameters["layer"]["description"] == "The layer, from 0, or from -1 backward."
    assert parameters["method"]["enum"] == list(attention.METHODS)
    assert "other URLs are not fetched" in parameters["image"]["description"]
    assert next(iter(classifier.predict_file(CAT).probs)) in answer.content[0].text
    assert not answer.isError
    assert "Upload the picture as a file" in fetched.content[0].text
    assert "There is no layer 99" in no_layer.content[0].text
    assert fetched.isError and no_layer.isError and empty.isError


@pytest.mark.slow
def test_a_picture_is_classified_and_explained(client, classifier):
    prediction = classifier.predict_file(CAT)
    probs, warning = client.predict(handle_file(CAT), api_name="/classify")
    assert probs == pytest.approx(prediction.probs, abs=1e-4)
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
        ("mean", 9, 0, ""): "no layer 9; choose from 0 to 1",
        ("head", 0, 9, ""): "no head 9; choose from 0 to 1",
        ("relevance", 0, 0, "zebra"): 'no class "zebra"; choose from airplane',
        ("gradient", 0, 0, ""): 'no map "gradient"',
        ("mean", "last", 0, ""): "must be whole numbers",
    }.items():
        with pytest.raises(AppError, match=message):
            client.predict(handle_file(CAT), *choice, api_name="/explain")
    reply = post(client.src.rstrip("/"), "v2/classify", {})
    assert "Upload the picture as a file" in reply
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
        reply = post(space_url, "classify", {"data": [value]})
        assert "event: error" in reply
        assert "Upload the picture as a file" in reply or "do not match the description" in reply
    assert "do not match the description" in post(space_url, "classify", {"data": []})
    with pytest.raises(HTTPError, match="404"):  # it would skip the queue
        headers = {"Content-Type": "application/json"}
        urlopen(Request(f"{space_url}/gradio_api/run/classify", b'{"data": []}', headers))
    for file in (CAT, "/etc/passwd", "app.py"):
        with pytest.raises(HTTPError, match="403"):
            urlopen(f"{space_url}/gradio_api/file={file}")
    server.shutdown()
    server.server_close()
    assert requests == []


@pytest.mark.slow
def test_64_simultaneous_requests_are_all_answered_in_order(space_url, classifier):
    # Each on a connection of its own: a Client shares one, and may lose the event after its last.
    paths = (inference.EXAMPLES * 7)[:64]
    uploads = {}
    for path in inference.EXAMPLES:
        reply = httpx.post(f"{space_url}/gradio_api/upload", files={"files": path.open("rb")})
        uploads[path] = {"path": reply.json()[0], "meta": {"_type": "gradio.FileData"}}
    bodies = [{"data": [uploads[path]]} for path in paths]
    with ThreadPoolExecutor(64) as pool:
        replies = list(pool.map(lambda body: post(space_url, "classify", body), bodies))
    for path, reply in zip(paths, replies, strict=True):
        event, _, data = reply.rstrip().rpartition("\ndata: ")
        assert event.endswith("event: complete")
        expected = classifier.predict_file(path).probs
        assert json.loads(data)[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_50_odd_files_are_answered_in_a_sentence_or_classified(client, tmp_path):
    whole, random = draw_image(0, (64, 48)), np.random.default_rng(0)
    for seed, (name, start) in enumerate({"png": 8, "jpeg": 3, "webp": 12, "gif": 6}.items()):
        whole.save(tmp_path / f"whole.{name}")
        data = (tmp_path / f"whole.{name}").read_bytes()
        for number in range(12):  # cut, or with bytes changed behind the signature
            broken = bytearray(data if number % 2 else data[: random.integers(start, len(data))])
            for position in random.integers(start, len(broken), size=number % 2 * 20):
                broken[position] = random.integers(256)
            (tmp_path / f"{seed}-{number}.{name}").write_bytes(broken)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 50
    sentences = "damaged or incomplete|not a picture|at least 8 pixels|megapixels"
    for file in files:
        try:
            probs, _ = client.predict(handle_file(str(file)), api_name="/classify")
            assert sum(probs.values()) == pytest.approx(1, abs=1e-4)
        except AppError as error:
            assert re.search(sentences, str(error)), file
