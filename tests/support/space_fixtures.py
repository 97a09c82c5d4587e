"""Fixtures for the Space: two untrained classifiers, and the Space running alone in a folder."""

import hashlib
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

ROOT = Path(__file__).parents[2]
DIGITS = [str(number) for number in range(10)]
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10 += ["dog", "frog", "horse", "ship", "truck"]


def build_model_folder(folder: Path, labels: list[str], dataset: str) -> Path:
    """Save an untrained ViT of 32 px whose attention is far from even, with made-up results."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8,
        intermediate_size=64, image_size=32, id2label=dict(enumerate(labels)),
        label2id={name: number for number, name in enumerate(labels)},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(40)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    files = ("model.safetensors", "config.json", "preprocessor_config.json")
    results = {
        "model": {
            "name": str(folder),
            "revision": None,
            "sha256": {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in files},
        },
        "dataset": {"name": dataset, "split": "test", "images": 360},
        "labels": labels,
        "accuracy": 0.1056,
        "accuracy_interval": [0.078, 0.1416],
        "ood": {
            "score": "energy",
            "threshold": 0.0,
            "target_tpr": 0.95,
            "pass_rate": {"validation": 0.95, "test": 0.953},
            "ood_datasets": {"handwritten digits": 0.02, "photographs": 0.081},
            "auroc": {"handwritten digits": 0.99, "photographs": 0.93},
        },
    }
    (folder / "evaluation_results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """An untrained classifier of digits."""
    return build_model_folder(tmp_path_factory.mktemp("digits"), DIGITS, "digits")


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory) -> Path:
    """An untrained classifier with the classes of CIFAR-10, whose examples the Space has."""
    return build_model_folder(tmp_path_factory.mktemp("cifar"), CIFAR10, "uoft-cs/cifar10")


@pytest.fixture(scope="session")
def app(cifar_folder):
    """The module `app`, which builds the page of the model in MODEL_ID when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_ID", str(cifar_folder))
        patch.setenv("SPACES_ZERO_GPU", "1")  # nothing is measured: it computes in float32
        return importlib.import_module("app")


def stage_space(folder: Path) -> Path:
    """Copy the files of the published Space, and nothing else."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "space", folder, ignore=ignored)
    shutil.copy(ROOT / "pipeline/explain/attention.py", folder)
    return folder


def start_space(folder: Path, environment: dict[str, str]) -> tuple[str, subprocess.Popen]:
    """Start a staged Space as the Hub does, with `python app.py`, and wait for its page.

    `environment` is added to what the process inherits, which is nothing of the Hub or Python.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))}
    variables |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(folder.parent / "files")}
    variables |= {"HF_HUB_OFFLINE": "1", "SPACES_ZERO_GPU": "1"} | environment  # in float32
    with open(folder.parent / "log.txt", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=variables, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    while process.poll() is None:
        try:
            urlopen(url).close()
            return url, process
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"The Space ended with status {process.returncode} before it answered.")


@pytest.fixture(scope="session")
def space_url(cifar_folder, tmp_path_factory):
    """The address of the Space, running alone in a folder."""
    folder = stage_space(tmp_path_factory.mktemp("space") / "app")
    url, process = start_space(folder, {"MODEL_ID": str(cifar_folder)})
    yield url
    process.terminate()
    process.wait()
    assert "Traceback" not in (folder.parent / "log.txt").read_text()
