import ast
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi, ModelCard
from transformers import pipeline

import push_to_hub
from hub_fixtures import MINE
from pipeline import runs
from pipeline.data.decoding import DecodedImages
from pipeline.data.loading import load_split
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import evaluate, save
from pipeline.evaluation.metrics import wilson_interval
from pipeline.publish import onnx
from pipeline.publish.staging import stage_model
from pipeline.recipe import load_recipe
from pipeline.training.model import load_model
from pipeline.training.train import train
from publishing import replace_file
from samples import ROOT, run_script

JAVASCRIPT = ROOT / "tests/publish/javascript"
TRANSFORMERS_JS = "@huggingface/transformers@4.3.1"
SIZE = 16  # pixels
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.slow
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of digits in `models/run`, exported to `results/run/onnx`; and its dataset."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        options = ["--num_train_epochs=12", "--learning_rate=1e-3"]
        options += [f"--image_size={SIZE}", "--image_size_schedule=null"]
        recipe = load_recipe("demo", [*options, "--disable_tqdm=true"], "run")
        train(recipe)
        save(evaluate("models/run", recipe.data), Path("results/run"))
        monkeypatch.setattr(onnx, "MIN_SAME_CLASS", 0.95)  # little trained, so near ties
        onnx.export("models/run", recipe.data)
    return folder, recipe.data


@pytest.fixture(scope="module")
def javascript(tmp_path_factory):
    """A folder with transformers.js and this test's scripts."""
    if shutil.which("npm") is None:
        pytest.skip("no npm on this machine")
    folder = tmp_path_factory.mktemp("javascript")
    shutil.copytree(JAVASCRIPT, folder, dirs_exist_ok=True)
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
    if subprocess.run([*command, TRANSFORMERS_JS], cwd=folder).returncode:
        pytest.skip("npm can't install transformers.js here")
    return folder


def test_every_copy_answers_as_the_model_and_is_in_the_manifest(exported, monkeypatch):
    folder, data = exported
    monkeypatch.chdir(folder)
    report = runs.read_json(folder / "results/run/onnx/onnx.json")
    assert report["weights"] == runs.sha256(folder / "models/run/model.safetensors")
    assert report["variants"].keys() == onnx.VARIANTS.keys()
    assert report["variants"]["model.onnx"]["max_logit_difference"] < 1e-4
    entries = runs.read_manifest(folder / "results/run")
    _, processor = load_model("models/run")
    test = load_split(data, "test", processor)
    classify = pipeline("image-classification", "models/run")
    for file, variant in report["variants"].items():
        path = folder / "results/run/onnx" / file
        assert variant["sha256"] == runs.sha256(path)
        assert variant["bytes"] == path.stat().st_size
        assert b"site-packages" not in path.read_bytes()  # paths of this machine
        assert variant["same_class"] >= 0.95
        correct = round(variant["accuracy"] * len(test))
        assert variant["accuracy_interval"] == wilson_interval(correct, len(test))
        assert entries[f"onnx/{file}"]["weights"] == report["weights"]
    from PIL import Image

    pixels = DecodedImages(test).batch(range(len(test)))["pixel_values"].permute(0, 2, 3, 1)
    answers = classify([Image.fromarray(image.numpy()) for image in pixels], top_k=1)
    right = np.mean([int(a[0]["label"]) == y for a, y in zip(answers, test["label"], strict=True)])
    assert report["variants"]["model.onnx"]["accuracy"] == pytest.approx(right)


def test_copies_checked_on_other_images_stop_the_push(exported, monkeypatch, api):
    folder, _ = exported
    monkeypatch.chdir(folder)
    file = folder / "results/run/onnx/onnx.json"
    report = runs.read_json(file)
    options = {"repo": "me/run", "license": "apache-2.0"}
    runs.write_json(file, report | {"data": "0" * 64})
    with pytest.raises(UserError, match=r"checked on other images .* run `make export"):
        stage_model(api, Path("models/run"), folder=folder / "staged", **options)
    runs.write_json(file, report)
    assert stage_model(api, Path("models/run"), folder=folder / "staged", **options).is_dir()


def test_a_copy_that_answers_otherwise_is_not_published(exported, monkeypatch):
    folder, data = exported
    monkeypatch.chdir(folder)
    shutil.copytree(folder / "models/run", folder / "models/other")
    monkeypatch.setattr(onnx, "MAX_LOGIT_DIFFERENCE", 0.0)
    with pytest.raises(UserError, match=r"copy of models/other differs from PyTorch by"):
        onnx.export("models/other", data, max_images=20)
    assert "onnx" not in str(runs.read_manifest(folder / "results/other"))


def test_the_copies_are_published_and_a_forged_accuracy_is_found(
    exported, hub_server, monkeypatch, capsys
):
    monkeypatch.chdir(exported[0])
    monkeypatch.setenv("HF_TOKEN", MINE)
    options = ("--model=models/run", "--license=apache-2.0")
    run_script(monkeypatch, push_to_hub.main, "me/pushed", *options)
    api = HfApi(endpoint=hub_server.url, token=MINE)
    info = api.model_info("me/pushed", files_metadata=True)
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings}
    variants = runs.read_json(Path("results/run/onnx/onnx.json"))["variants"]
    for file, variant in variants.items():
        assert sizes[f"onnx/{file}"] == variant["bytes"]
    card = Path(api.hf_hub_download("me/pushed", "README.md", local_dir="copy")).read_text()
    assert "transformers.js" in ModelCard(card).data.tags
    int8 = variants["model_quantized.onnx"]
    size, accuracy = f"{int8['bytes'] / 1e6:.1f}", f"{100 * int8['accuracy']:.2f} %"
    assert f"[`q8`](onnx/model_quantized.onnx) (int8) | {size} | {accuracy} (" in card

    report = runs.read_json(Path("results/run/onnx/onnx.json"))
    report["variants"]["model_quantized.onnx"]["accuracy"] = 1.0
    replace_file(api, "onnx/onnx.json", json.dumps(report, indent=1).encode(), repo="me/pushed")
    with pytest.raises(UserError, match=r"ONNX copies are not those of onnx/onnx.json"):
        run_script(monkeypatch, push_to_hub.main, "me/pushed", "--verify_only")


README = (ROOT / "README.md").read_text("utf-8")


def snippet(language: str) -> str:
    """A snippet of the README, for the model and the image of the tests."""
    text = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)[1]
    assert "you/vit-cifar10" in text
    assert "cat.jpg" in text
    return text.replace("you/vit-cifar10", "me/run").replace("cat.jpg", "0.png")


def test_the_snippets_of_the_readme_run(published, javascript, exported):
    url, images = published
    write_images(javascript, images)
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": MINE}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(javascript / "home")}
    python = subprocess.run(
        [sys.executable, "-c", snippet("python")],
        cwd=javascript, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert python.returncode == 0, python.stderr
    # transformers.js asks the real Hub: the snippet is the same but for two settings.
    settings = f"import {{ env }} from '@huggingface/transformers';\nenv.remoteHost = '{url}';\n"
    settings += "env.cacheDir = './cache';\n"
    (javascript / "readme.mjs").write_text(settings + snippet("javascript"))
    shutil.rmtree(javascript / "cache", ignore_errors=True)
    node = subprocess.run(["node", "readme.mjs"], cwd=javascript, capture_output=True, text=True)
    assert node.returncode == 0, node.stderr
    label = ast.literal_eval(python.stdout)[0]["label"]
    assert re.search(r"label: '(\w+)'", node.stdout)[1] == label


@pytest.fixture
def published(exported, hub_server):
    """The model and its copies on a local Hub, as `me/run`; and images of the model's size."""
    folder, data = exported
    api = HfApi(endpoint=hub_server.url, token=MINE)
    api.create_repo("me/run")
    options = {"repo_id": "me/run", "allow_patterns": ["*.json", "*.safetensors", "*.onnx"]}
    api.upload_folder(folder_path=folder / "models/run", **options)
    api.upload_folder(folder_path=folder / "results/run/onnx", path_in_repo="onnx", **options)
    _, processor = load_model(str(folder / "models/run"))
    images = DecodedImages(load_split(data, "test", processor)).batch(range(8))["pixel_values"]
    return hub_server.url, images.permute(0, 2, 3, 1).numpy()


def write_images(folder: Path, images: np.ndarray) -> list[str]:
    """Write images (N, H, W, 3) at the model's size: its resize is not what is compared."""
    from PIL import Image

    names = [f"{i}.png" for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / name)
    return names


def check_answers(answers: list, folder: Path, names: list[str], dtype: str, exported) -> None:
    classify = pipeline("image-classification", str(exported / "models/run"))
    expected = classify([str(folder / name) for name in names], top_k=10)
    assert len(answers) == len(expected)
    for ours, theirs in zip(answers, expected, strict=True):
        assert ours[0]["label"] == theirs[0]["label"]
        probs = {answer["label"]: answer["score"] for answer in theirs}
        tolerance = 1e-4 if dtype == "fp32" else 0.05
        assert {a["label"]: a["score"] for a in ours} == pytest.approx(probs, abs=tolerance)


@pytest.mark.parametrize("dtype", ["fp32", "q8"])
def test_node_answers_as_pipeline_does(published, javascript, exported, dtype):
    url, images = published
    names = write_images(javascript, images)
    command = ["node", "classify.mjs", url, "me/run", dtype, *names]
    shutil.rmtree(javascript / "cache", ignore_errors=True)
    done = subprocess.run(command, cwd=javascript, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_answers(json.loads(done.stdout), javascript, names, dtype, exported[0])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_browser_answers_as_pipeline_does(published, javascript, exported):
    sync_api = pytest.importorskip("playwright.sync_api")
    url, images = published
    names = write_images(javascript, images)

    class Handler(SimpleHTTPRequestHandler):
        """The page and its packages, and the Hub below /hub/: it answers no other page."""

        def __init__(self, *args):
            super().__init__(*args, directory=javascript)

        def do_GET(self):
            if not self.path.startswith("/hub/"):
                return super().do_GET()
            try:
                reply = urllib.request.urlopen(url + self.path.removeprefix("/hub"))
            except urllib.error.HTTPError as error:
                return self.send_error(error.code)
            self.send_response(200)
            self.send_header("Content-Length", reply.headers["Content-Length"])
            self.end_headers()
            shutil.copyfileobj(reply, self.wfile)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page()
        for dtype in ("fp32", "q8"):
            query = f"?model=me/run&dtype={dtype}&images={','.join(names)}"
            page.goto(f"http://127.0.0.1:{server.server_port}/index.html{query}")
            page.wait_for_function("window.answers", timeout=120_000)
            answers = page.evaluate("window.answers")
            assert isinstance(answers, list), answers
            check_answers(answers, javascript, names, dtype, exported[0])
        browser.close()
    server.shutdown()
