"""Fixtures: small models, small datasets, an empty folder to work in."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Before any library reads them: caches of the tests' own, no Hub, one thread for each process of
# `pytest -n`.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hub_fixtures import hub_server  # noqa: F401
from pipeline import runs
from pipeline.evaluation import ood
from samples import ROOT, SMALL_VIT, draw_image
from space_fixtures import app, cifar_folder, model_folder, space_url  # noqa: F401

SHARED = ROOT.parent / "shared"
# A recipe that learns in a second or two, and so evenly that rounding does not show.
TINY_RECIPE = """
dataset: digits
model_config: {model_type: vit, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2,
  intermediate_size: 64, patch_size: 16}
image_size: 32
random_crop_padding: 0.125
num_train_epochs: 1
per_device_train_batch_size: 64
learning_rate: 3.0e-3
disable_tqdm: true
"""
ood.IMAGES = 100  # in each OOD dataset: every evaluation predicts them


@pytest.fixture(autouse=True)
def nothing_printed_yet() -> None:
    """Each test sees the lines that a process prints once."""
    runs.print_once.cache_clear()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in: runs write to `models` and `results` in it."""
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
    torch.manual_seed(0)
    vit = ViTConfig(**SMALL_VIT, intermediate_size=64, image_size=32)
    dinov2 = Dinov2Config(**SMALL_VIT, mlp_ratio=2, image_size=32)
    models = {
        "vit": ViTForImageClassification(vit),
        "dinov2": Dinov2ForImageClassification(dinov2),
    }
    folders = {}
    for name, model in models.items():
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture
def tiny_recipe(here) -> str:
    """The path of TINY_RECIPE."""
    path = here / "tiny.yaml"
    path.write_text(TINY_RECIPE)
    return str(path)


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory) -> Path:
    """Four epochs of TINY_RECIPE, in `models/run`."""
    from pipeline.recipe import load_recipe
    from pipeline.training.train import train

    root = tmp_path_factory.mktemp("trained")
    (root / "tiny.yaml").write_text(TINY_RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train(load_recipe("tiny.yaml", ["--num_train_epochs=4"], "run"))
    return root


@pytest.fixture
def trained(trained_once, here) -> str:
    """A copy of that in the folder worked in; its name is returned."""
    shutil.copytree(trained_once, here, dirs_exist_ok=True)
    return "models/run"


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """One folder per class: 20 images each of cat and dog, of 12 x 10 pixels, as PNG."""
    for label, start in (("cat", 0), ("dog", 100)):
        folder = tmp_path / "pets" / "train" / label
        folder.mkdir(parents=True)
        for i in range(20):
            draw_image(start + i).save(folder / f"{i:02}.png")
    return tmp_path / "pets"


@pytest.fixture(scope="session")
def evaluated_once(tmp_path_factory) -> Path:
    """An untrained model of digits in `models/tiny`, and its evaluation in `results/tiny`."""
    from pipeline import plots, runs
    from pipeline.evaluation.evaluate import evaluate, save
    from pipeline.recipe import DataArguments, ModelArguments
    from pipeline.training.model import build_model, build_processor

    root = tmp_path_factory.mktemp("evaluated")
    folder, results_folder = root / "models/tiny", root / "results/tiny"
    torch.manual_seed(0)
    config = SMALL_VIT | {"model_type": "vit", "intermediate_size": 64}
    arguments = ModelArguments(model_config=config, image_size=32)
    build_model(arguments, [str(n) for n in range(10)]).save_pretrained(folder)
    build_processor(arguments).save_pretrained(folder)
    (folder / "recipe.yaml").write_text("dataset: digits\nseed: 0\n")
    results = evaluate(str(folder), DataArguments(dataset="digits"))
    results["model"]["name"] = "models/tiny"
    save(results, results_folder)
    plots.confusion_matrix(
        results["confusion_matrix"], results["labels"], results_folder / "confusion_matrix.png"
    )
    weights = results["model"]["sha256"]["model.safetensors"]
    runs.record_files(results_folder, {"confusion_matrix.png": None}, weights)
    return root


@pytest.fixture
def measured(evaluated_once, here) -> Path:
    """A copy of that in the folder worked in."""
    shutil.copytree(evaluated_once, here, dirs_exist_ok=True, symlinks=True)
    return here
