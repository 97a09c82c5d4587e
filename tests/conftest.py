"""Small real things to test with: models built from a config, images drawn here, digits."""

import atexit
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

# Before any library reads them: caches of the tests' own, no Hub.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
ROOT = Path(__file__).parents[1]

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "space")]
import local_hub

SHARED = ROOT.parent / "shared"
RESULTS = "evaluation_results.json"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in: runs write to `models` and `results` below it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of pretrained backbones and real CIFAR-10 images, where there is one."""
    if not (SHARED / "models").is_dir():
        pytest.skip("no pretrained backbones beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def backbones(tmp_path_factory) -> dict[str, str]:
    """Untrained backbones of 32 px, saved as a Hub repository is: vit and dinov2."""
    folders = {}
    torch.manual_seed(0)
    for name, model in {
        "vit": ViTForImageClassification(ViTConfig(**SMALL, intermediate_size=64, image_size=32)),
        "dinov2": Dinov2ForImageClassification(Dinov2Config(**SMALL, mlp_ratio=2, image_size=32)),
    }.items():
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture
def tiny_recipe(here) -> str:
    """A recipe that learns in a second or two, and so evenly that rounding does not show."""
    path = here / "tiny.yaml"
    path.write_text(
        "dataset: digits\n"
        "model_config: {model_type: vit, hidden_size: 32, num_hidden_layers: 2,\n"
        "  num_attention_heads: 2, intermediate_size: 64, patch_size: 16}\n"
        "image_size: 32\n"
        "crop_padding: 0.125\n"
        "num_train_epochs: 1\n"
        "per_device_train_batch_size: 64\n"
        "learning_rate: 3.0e-3\n"
        "disable_tqdm: true\n"
    )
    return str(path)


def draw_image(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """Random pixels; `size` is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """One folder per class: 20 images each of cat and dog, of 12 x 10 pixels, as PNG."""
    for label, start in (("cat", 0), ("dog", 100)):
        folder = tmp_path / "pets" / "train" / label
        folder.mkdir(parents=True)
        for i in range(20):
            draw_image(start + i).save(folder / f"{i:02}.png")
    return tmp_path / "pets"


class FaultyHandler(local_hub.Handler):
    """Fails as `server.faults` says: the first that matches a request is taken out and acted on.

    A fault is (method, part of the path, what): a status to answer with, "drop" the connection
    before acting, "lose" the reply after acting, "cut" the body short, "corrupt" it, or a
    function to call before acting.
    """

    def answer(self):
        self.fault = self._next_fault()
        if callable(self.fault):
            self.fault()
        if isinstance(self.fault, int):
            self.url, self.query = urlsplit(self.path), {}
            for _ in self._incoming():
                pass
            return self._send(self.fault, {}, b"")
        if self.fault == "drop":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        super().answer()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def _send(self, status, headers, body, start=0, size=None):
        if self.fault == "lose":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if self.fault not in ("cut", "corrupt"):
            return super()._send(status, headers, body, start, size)
        body = body.read_bytes() if isinstance(body, Path) else body
        if self.fault == "corrupt":
            return super()._send(status, headers, body[:-1] + bytes([body[-1] ^ 1]))
        whole, self.wfile = self.wfile, io.BytesIO()
        super()._send(status, headers, body)
        sent = self.wfile.getvalue()
        whole.write(sent[: -len(body) // 2])
        whole.flush()
        self.close_connection = True
        return self.connection.shutdown(socket.SHUT_RDWR)

    def _next_fault(self):
        with self.server.lock:
            for fault in self.server.faults:
                method, part, what = fault
                if method == self.command and part in self.path:
                    self.server.faults.remove(fault)
                    return what
        return None


TOKENS = {
    "hf_mine0000000000000000000000000000000": {"name": "me", "role": "write", "orgs": ["lab"]},
    "hf_reader00000000000000000000000000000": {"name": "me", "role": "read", "orgs": []},
    "hf_other000000000000000000000000000000": {"name": "other", "role": "write", "orgs": []},
}
MINE, READER, OTHER = TOKENS


@pytest.fixture
def hub_server(tmp_path, monkeypatch):
    """A local Hub of its own, which the clients of this process are pointed to."""
    server = local_hub.LocalHub(tmp_path / "hub", TOKENS, handler=FaultyHandler)
    server.faults, server.lock = [], threading.Lock()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    yield server
    server.shutdown()
    server.server_close()


FAITHFULNESS = {
    "random": {kind: {"area": 0.5} for kind in ("deletion", "insertion")},
    "mean": {
        "deletion": {
            "area": 0.4,
            "better_by": 0.1,
            "better_by_interval": [0.05, 0.15],
            "beats_random": True,
        },
        "insertion": {
            "area": 0.48,
            "better_by": -0.02,
            "better_by_interval": [-0.07, 0.03],
            "beats_random": False,
        },
    },
}


@pytest.fixture(scope="session")
def measured_once(tmp_path_factory) -> Path:
    """An untrained model of digits in `models/tiny`, and what it scored in `results`."""
    from pipeline import evaluation, figures
    from pipeline.model import build, build_processor
    from pipeline.recipe import DataArguments, ModelArguments

    root = tmp_path_factory.mktemp("measured")
    folder = root / "models/tiny"
    torch.manual_seed(0)
    arguments = ModelArguments(
        model_config=SMALL | {"model_type": "vit", "intermediate_size": 64}, image_size=32
    )
    build(arguments, [str(n) for n in range(10)]).save_pretrained(folder)
    build_processor(arguments).save_pretrained(folder)
    (folder / "recipe.yaml").write_text("dataset: digits\nseed: 0\n")
    results = evaluation.evaluate(str(folder), DataArguments(dataset="digits"))
    evaluation.write(results, root / "results")
    figures.confusion_matrix(
        results["confusion_matrix"], results["labels"], root / "results/confusion_matrix.png"
    )
    return root


@pytest.fixture
def measured(measured_once, here) -> Path:
    """A copy of it in the folder worked in."""
    shutil.copytree(measured_once, here, dirs_exist_ok=True)
    return here


@pytest.fixture(scope="session")
def space(measured_once, tmp_path_factory):
    """The address of a Space run as the Hub runs it: alone in a folder, its model from a Hub."""
    from pipeline import hub
    from pipeline import space as published

    root = tmp_path_factory.mktemp("space")
    model = root / "model"
    shutil.copytree(measured_once / "models/tiny", model)
    shutil.copyfile(measured_once / "results" / RESULTS, model / RESULTS)
    server = local_hub.LocalHub(root / "hub", TOKENS)
    repo = local_hub.Repo(server.root, "models", "me/digits")
    repo.create({"private": False, "sdk": None, "variables": {}})
    repo.add_folder(model)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    shown = published.Model("me/digits", repo.revision("main"), False, [])
    hub.stage(published.files(), published.readme(shown), root / "app", MINE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))}
    variables |= local_hub.environment(server) | shown.variables
    variables |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(root / "uploads")}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=root / "app", env=variables)
    url = f"http://127.0.0.1:{port}"
    try:
        await_page(url, process)
        yield url
    finally:
        process.terminate()
        process.wait()
        server.shutdown()
        server.server_close()


def await_page(url: str, process: subprocess.Popen) -> None:
    while process.poll() is None:
        try:
            return urlopen(url).close()
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"The Space ended with {process.returncode} before it answered.")
