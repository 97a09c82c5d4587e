"""A sweep over transformers' families of image classifiers, each by a tiny random checkpoint.

Each is trained for two steps, resumed, evaluated and compared with `pipeline()`, or refused in one
sentence. `docs/backbones.md` is the table of what was measured.
"""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageClassification, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from pipeline.data.decoding import content_hash
from pipeline.data.loading import load_split
from pipeline.data.transforms import resize_options
from pipeline.errors import UserError
from pipeline.evaluation import ood
from pipeline.evaluation.evaluate import evaluate, predict
from pipeline.explain.attention import compute_maps
from pipeline.recipe import DataArguments, ModelArguments, load_recipe
from pipeline.training.model import build_model, build_processor, load_model
from pipeline.training.optimizer import parameter_groups
from pipeline.training.train import train
from samples import ROOT, image_processor

TABLE = ROOT / "docs/backbones.md"
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
VIT = WIDTHS | {"intermediate_size": 64, "image_size": 32}
DINO = WIDTHS | {"mlp_ratio": 2, "image_size": 32}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "vocab_size": 50}  # fmt: skip
CLIP = {"vision_config": VIT, "text_config": TEXT}
NAFLEX = {key: value for key, value in VIT.items() if key != "image_size"} | {"num_patches": 16}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "patch_size": 4,
        "image_size": 32}  # fmt: skip
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
PYRAMID = STAGES | {"num_attention_heads": [1, 1, 2, 2]}
FAMILIES = {
    "vit": VIT,
    "deit": VIT,
    "deit with teacher": VIT,
    "vit_msn": VIT,
    "ijepa": VIT,
    "beit": VIT | {"use_relative_position_bias": True},
    "beit with [CLS]": VIT | {"use_absolute_position_embeddings": True, "use_mean_pooling": False},
    "data2vec-vision": VIT | {"use_shared_relative_position_bias": True},
    "dinov2": DINO,
    "dinov2_with_registers": DINO,
    "clip": CLIP,
    "metaclip_2": CLIP,
    "siglip": CLIP,
    "siglip2": {"vision_config": NAFLEX, "text_config": TEXT},
    "swin": SWIN,
    "swinv2": SWIN,
    "donut-swin": SWIN,
    "convnext": STAGES,
    "convnextv2": STAGES,
    "resnet": STAGES | {"embedding_size": 8, "layer_type": "basic"},
    "regnet": STAGES | {"embedding_size": 8, "groups_width": 8},
    "bit": STAGES | {"embedding_size": 8, "num_groups": 2},
    "segformer": PYRAMID,
    "poolformer": STAGES,
    "hiera": {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "image_size": [32, 32],
              "masked_unit_size": [4, 4], "num_query_pool": 2},
    "hgnet_v2": {"embedding_size": 8, "stem_channels": [3, 8, 8], "hidden_sizes": [8, 16, 24, 32],
                 "depths": [1, 1, 1, 1], "stage_in_channels": [8, 8, 16, 24],
                 "stage_mid_channels": [8, 8, 8, 8], "stage_out_channels": [8, 16, 24, 32],
                 "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2]},
    "cvt": {"embed_dim": [8, 8, 16], "num_heads": [1, 1, 2], "depth": [1, 2, 3]},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128,
                     "image_size": 64},
    "focalnet": {"embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3],
                 "hidden_sizes": [8, 16], "image_size": 32},
    "levit": {"hidden_sizes": [16, 16, 16], "num_attention_heads": [1, 1, 1], "depths": [1, 1, 1],
              "key_dim": [8, 8, 8], "image_size": 64},
    "levit with teacher": {"hidden_sizes": [16, 16, 16], "num_attention_heads": [1, 1, 1],
                           "depths": [1, 1, 1], "key_dim": [8, 8, 8], "image_size": 64},
    "mobilenet_v1": {"depth_multiplier": 0.25, "min_depth": 4, "image_size": 32},
    "mobilenet_v2": {"depth_multiplier": 0.25, "min_depth": 4, "depth_divisible_by": 4,
                     "image_size": 32},
    "mobilevit": {"hidden_sizes": [12, 12, 12], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
                  "num_attention_heads": 2, "image_size": 64},
    "mobilevitv2": {"width_multiplier": 0.1, "base_attn_unit_dims": [16, 24, 32],
                    "n_attn_blocks": [1, 1, 1], "image_size": 64},
    "pvt": PYRAMID | {"image_size": 64},
    "pvt_v2": PYRAMID | {"image_size": 64},
    "swiftformer": {"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "image_size": 64},
    "textnet": {"stem_out_channels": 8, "hidden_sizes": [8, 8, 8, 16, 16], "image_size": [32, 32]},
}  # fmt: skip
# The family, its config, and what the one sentence says.
REFUSED = {
    "vit_mae": (VIT, 'no image classifier of the type "vit_mae"'),
    "dinov3_vit": (VIT, 'no image classifier of the type "dinov3_vit"'),
    "timm_wrapper": ({"architecture": "resnet18"}, "is a checkpoint of timm"),
    "dinat": ({}, "requires the natten library"),
    "imagegpt": ({}, "does not take an image's pixels"),
    "perceiver": ({}, "does not take an image's pixels"),
    "pp_lcnet": ({"scale": 0.25}, "does not give one logit for each class"),
    "vit in gray": (VIT | {"num_channels": 1}, "takes images of 1 channels"),
    "vit of rectangles": (VIT | {"image_size": [32, 64]}, "takes rectangles (32 x 64)"),
    "vit of rectangular patches": (VIT | {"patch_size": [8, 4]}, "takes rectangles (8 x 4)"),
}
PROCESSORS = {  # that are not ViT's
    "dinov2": transformers.BitImageProcessorPil(size={"shortest_edge": 40}, crop_size=32),
    "efficientnet": transformers.EfficientNetImageProcessorPil(rescale_offset=True),
    "mobilevit": transformers.MobileViTImageProcessorPil(),
    "segformer": transformers.SegformerImageProcessorPil(image_mean=0.4, image_std=0.3),
    "siglip2": transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16),
}
# What a checkpoint's config may hold, and must not change what is trained and evaluated.
OPTIONS = {
    "output_hidden_states": True,
    "return_dict": False,
    "problem_type": "multi_label_classification",
}
OOD_DATASETS = {}  # made once for all families


def ood_datasets(processor, make=ood.ood_datasets) -> dict:
    key = resize_options(processor)
    if key not in OOD_DATASETS:
        OOD_DATASETS[key] = make(processor)
    return OOD_DATASETS[key]


HEAD = """# Backbones

What this pipeline does with each family of transformers' image classifiers, by its `model_type`:
measured on tiny random checkpoints by `tests/training/test_backbones.py`, which trains each for two
steps, resumes, evaluates, and compares with `pipeline()`. Another image size or layer decay marked
"no" is refused before training starts. Where there are no maps, the model can be trained, evaluated
and published, but `make visualize` and the Space refuse it.

The recipes `cpu` and `dinov2-small` are for patches of 14 pixels, with layer decay. For a ViT with
patches of 16, add `ARGS="--image_size=96 --image_size_schedule=null"`; for a family without layer
decay, also `--layer_decay=1`.

Every weight of a checkpoint's backbone arrives, or it is an error; only the head is new. Of the
checkpoint's image processor, the treatment of colors and the filter are kept; the recipe's `resize`
(`squash` or `crop`) replaces its resizing, cropping and padding.

| Family | Train | Other image size | Layer decay | Maps |
|:--|:--|:--|:--|:--|
"""
TAIL = """
SigLIP 2 NaFlex is converted to SigLIP, to which it is equivalent on square images. Maps need a
[CLS] token that the model classifies by. Not trained, with what the error says:

"""


def model_type(family: str) -> str:
    return family.partition(" ")[0]


def image_size(family: str) -> int:
    size = FAMILIES[family].get("image_size", 32)
    return size[0] if isinstance(size, list) else size


def save_checkpoint(family: str, folder: Path) -> None:
    """A random checkpoint, in which no weight has its initial value."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type(family), **FAMILIES[family])
    names = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[model_type(family)]
    names = names if isinstance(names, tuple) else (names,)
    model = getattr(transformers, names["teacher" in family])(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    file = folder / "config.json"
    has_drop_path = isinstance(getattr(config, "drop_path_rate", None), float)
    options = OPTIONS | ({"drop_path_rate": 0.1} if has_drop_path else {})
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    side = image_size(family)
    plain = ViTImageProcessorPil(size={"height": side, "width": side})
    PROCESSORS.get(family, plain).save_pretrained(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of images of two classes and mixed sizes, in train and test."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label in ("cat", "dog"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                small = generator.integers(0, 256, (5, 7, 3), np.uint8)
                size = (40, 30) if i % 2 else (33, 50)
                Image.fromarray(small).resize(size, Image.BICUBIC).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def measured() -> dict[str, list[str]]:
    """The rows of the table, as the sweep measures them."""
    return {}


def assert_pipeline_agrees(model, processor, test, folder: Path, pictures: Path) -> None:
    probs = predict(model, processor, test)[0].softmax(dim=1)
    classify = pipeline("image-classification", str(folder))
    files = sorted((pictures / "test").glob("*/*.png"))
    for answer, row in zip(classify([str(file) for file in files], top_k=2), probs, strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        assert abs(scores["cat"] - row[0].item()) < 1e-4


def is_refused(function, *args) -> bool:
    try:
        function(*args)
    except (UserError, ValueError):  # attention.py, which the Space ships, knows no UserError
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_resumes_and_agrees_with_pipeline(
    family, here, pictures, measured, monkeypatch
):
    monkeypatch.setattr(ood, "ood_datasets", ood_datasets)
    side, checkpoint = image_size(family), here / "checkpoint"
    save_checkpoint(family, checkpoint)

    # All weights arrive but those of the head.
    arguments = ModelArguments(model=str(checkpoint), image_size=side)
    model = build_model(arguments, ["cat", "dog"]).eval()
    model.save_pretrained(here / "built")
    before, built = (load_file(here / f / "model.safetensors") for f in ("checkpoint", "built"))
    if family == "siglip2":
        key = "vision_model.embeddings.patch_embedding.weight"
        built[key] = built[key].permute(0, 2, 3, 1).flatten(1)
    kept = {n for n, value in before.items() if n in built and torch.equal(built[n], value)}
    heads = ("classifier", "cls_classifier", "distillation_classifier", "classifier_distill",
             "fc", "head", "dist_head")  # fmt: skip
    assert {name for name in before.keys() - kept if name.split(".")[0] not in heads} == set()
    assert len(kept) > 30

    # Two steps, and the second once more from the checkpoint between them.
    (here / "recipe.yaml").write_text(
        f"model: {checkpoint}\ndataset: {pictures}\nimage_size: {side}\nmax_steps: 2\n"
        "validation_size: 0.25\nper_device_train_batch_size: 6\nload_best_model_at_end: false\n"
        "eval_strategy: steps\neval_steps: 1\nsave_strategy: steps\nsave_steps: 1\n"
        "learning_rate: 1.0e-3\nhorizontal_flip: true\ndisable_tqdm: true\n"
    )
    recipe = load_recipe("recipe.yaml", run="run")
    train(recipe)
    folder = here / "models/run"
    whole = load_file(folder / "model.safetensors")
    assert any(not torch.equal(whole[name], built[name]) for name in kept if name in whole)
    shutil.rmtree(folder)
    shutil.rmtree(here / "models/checkpoints/run/checkpoint-2")
    train(load_recipe("recipe.yaml", run="run"))
    resumed = load_file(folder / "model.safetensors")
    assert resumed.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []

    # Evaluated, and the same by plain `pipeline()` from the files.
    data = DataArguments(dataset=str(pictures), validation_size=0.25)
    results = evaluate(str(folder), data)
    assert len(results["predictions"]) == 8
    model, processor = load_model(str(folder))
    test = load_split(data, "test", processor)
    assert_pipeline_agrees(model, processor, test, folder, pictures)

    # What else it can do.
    pixels = torch.randn(2, 3, side, side)
    other_size = ModelArguments(model=str(checkpoint), image_size=2 * side)
    refused = [
        is_refused(build_model, other_size, ["cat", "dog"]),
        is_refused(parameter_groups, model, 1.0, 0.1, 0.5),
        is_refused(compute_maps, model, pixels),
    ]
    measured[family] = ["yes", *("no" if value else "yes" for value in refused)]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True], ids=["decoded", "streamed"])
def test_a_cropped_model_agrees_with_pipeline(here, pictures, streaming):
    save_checkpoint("vit", here / "checkpoint")
    (here / "recipe.yaml").write_text(
        f"model: {here}/checkpoint\ndataset: {pictures}\nimage_size: 32\nresize: crop\n"
        f"validation_size: 0.25\nper_device_train_batch_size: 6\nstreaming: {streaming}\n"
        "max_steps: 1\neval_steps: 1\nsave_steps: 1\ndisable_tqdm: true\n"
    )
    train(load_recipe("recipe.yaml", run="run"))
    folder = here / "models/run"
    data = DataArguments(dataset=str(pictures), validation_size=0.25)
    model, processor = load_model(str(folder))
    assert processor.do_center_crop
    test = load_split(data, "test", processor)
    assert_pipeline_agrees(model, processor, test, folder, pictures)
    results = evaluate(str(folder), data)
    logits, _ = predict(model, processor, test)
    assert results["predictions"] == logits.argmax(dim=1).tolist()
    assert results["dataset"]["sha256"] == content_hash(test)
    squashed = load_split(data, "test", image_processor(32, processor.resample))
    assert content_hash(squashed) != content_hash(test)


@pytest.mark.parametrize("family", REFUSED)
def test_what_can_not_be_trained_is_refused_in_one_sentence(family, tmp_path):
    config, message = REFUSED[family]
    config = {"model_type": model_type(family)} | config
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if family == "pp_lcnet":
        AutoModelForImageClassification.from_config(
            AutoConfig.from_pretrained(tmp_path)
        ).save_pretrained(tmp_path)
    ViTImageProcessorPil().save_pretrained(tmp_path)
    arguments = ModelArguments(model=str(tmp_path), image_size=32)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        if family not in ("pp_lcnet", "dinat"):  # these two are refused with their weights
            build_processor(arguments)
        build_model(arguments, ["cat", "dog"])
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_table_in_docs_is_what_was_measured(measured):
    if len(measured) < len(FAMILIES):
        pytest.skip("the whole sweep has not run, or has failed")
    rows = [f"| {family} | {' | '.join(row)} |" for family, row in measured.items()]
    refused = [f"- {family}: {message}" for family, (_, message) in REFUSED.items()]
    text = "\n".join([*HEAD.splitlines(), *rows, *TAIL.splitlines(), *refused, ""])
    if os.environ.get("WRITE_TABLE"):
        TABLE.write_text(text, "utf-8")
    assert TABLE.read_text("utf-8") == text, (
        "docs/backbones.md is not what was measured; write it anew with "
        "WRITE_TABLE=1 .venv/bin/python -m pytest tests/training/test_backbones.py"
    )
