import json

import pytest
import torch
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Siglip2Config,
    Siglip2ForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from pipeline.errors import UserError
from pipeline.recipe import ModelArguments
from pipeline.training.backbone import interpolate_positions
from pipeline.training.model import build_model, build_processor, load_model
from pipeline.training.optimizer import layers, parameter_groups
from samples import SMALL_VIT

SMALL = SMALL_VIT | {"intermediate_size": 64, "image_size": 32}
LABELS = ["cat", "dog", "owl"]


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_the_backbone_is_kept_and_the_head_is_new(backbones, kind):
    source, _ = load_model(backbones[kind])
    model = build_model(ModelArguments(model=backbones[kind], image_size=32), LABELS)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert model.config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    head = model.state_dict()["classifier.weight"]
    assert head.shape[0] == 3
    body = {k: v for k, v in source.state_dict().items() if not k.startswith("classifier")}
    assert len(body) > 20
    for name, weights in body.items():
        assert torch.equal(model.state_dict()[name], weights), name
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_another_resolution_interpolates_the_position_embeddings(backbones, kind, tmp_path):
    arguments = ModelArguments(model=backbones[kind], image_size=48)
    model, processor = build_model(arguments, LABELS), build_processor(arguments)
    table = next(v for k, v in model.state_dict().items() if k.endswith("position_embeddings"))
    assert table.shape == (1, 1 + 6 * 6, 32)
    assert model.config.image_size == 48
    assert processor.size["height"] == processor.size["width"] == 48
    # What is saved says so too, and gives the same.
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor = load_model(str(tmp_path))
    pixels = torch.randn(2, 3, 48, 48)
    assert processor.size["height"] == 48
    assert torch.equal(again(pixels).logits, model.eval()(pixels).logits)


def test_a_model_without_sdpa_is_built_and_loaded(tmp_path):
    small = {"model_type": "convnext", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8]}
    arguments = ModelArguments(model_config=small, image_size=96)
    model = build_model(arguments, LABELS)
    model.save_pretrained(tmp_path)
    build_processor(arguments).save_pretrained(tmp_path)
    again, _ = load_model(str(tmp_path))
    pixels = torch.randn(2, 3, 96, 96)
    assert torch.equal(again(pixels).logits, model.eval()(pixels).logits)


@pytest.mark.parametrize(("size", "attention"), [(32, "eager"), (136, "sdpa")])
def test_attention_is_eager_for_few_patches_on_a_cpu(backbones, size, attention):
    arguments = ModelArguments(model=backbones["vit"], image_size=size)  # patches of 8
    wanted = "sdpa" if torch.accelerator.is_available() else attention
    assert build_model(arguments, LABELS).config._attn_implementation == wanted


def test_interpolated_positions_keep_the_tokens_and_the_picture():
    rows = torch.linspace(0, 1, 4)[None, :, None, None].expand(1, 4, 4, 8)  # brighter downwards
    table = torch.cat([torch.full((1, 2, 8), 7.0), rows.reshape(1, 16, 8)], dim=1)
    resized = interpolate_positions(table, patches=64)
    assert resized.shape == (1, 2 + 64, 8)
    assert (resized[:, :2] == 7).all()
    column = resized[0, 2:, 0].reshape(8, 8)[:, 3]
    assert (column.diff() > 0).sum() >= 6
    assert torch.equal(interpolate_positions(table, patches=16), table)


def test_patches_that_do_not_divide_the_size_name_the_nearest(backbones):
    with pytest.raises(UserError, match="image_size is 100, .* 8 pixels .* are 96 and 104"):
        build_model(ModelArguments(model=backbones["vit"], image_size=100), LABELS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "lacks 16 weights of the backbone"),
        ({"num_hidden_layers": 1}, "has, beyond its config, 16 weights of the backbone"),
        ({"qkv_bias": False}, "has, beyond its config, 6 weights of the backbone"),
        ({"intermediate_size": 48}, "has, in another shape than its config, 6 weights of the back"),
        ({"image_size": 64}, "has, in another shape than its config, 1 weights of the backbone"),
    ],
)
def test_a_checkpoint_that_is_not_its_configs_backbone_is_refused(tmp_path, change, message):
    ViTModel(ViTConfig(**SMALL)).save_pretrained(tmp_path)  # with a pooler, which may stay behind
    arguments = ModelArguments(model=str(tmp_path), image_size=32)
    build_model(arguments, LABELS)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        build_model(arguments, LABELS)


def save_untrained(model, folder) -> str:
    """Save a classifier of LABELS in which no weight has its initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "source",
    [
        ViTForImageClassification(ViTConfig(**SMALL, num_labels=3)),
        BeitForImageClassification(
            BeitConfig(**SMALL, num_labels=3, use_relative_position_bias=True)
        ),
        Data2VecVisionForImageClassification(
            Data2VecVisionConfig(**SMALL, num_labels=3, use_shared_relative_position_bias=True)
        ),
        SiglipForImageClassification(SiglipConfig(vision_config=SMALL, num_labels=3)),
    ],
    ids=["vit", "beit", "data2vec", "siglip"],
)
def test_another_image_size_is_the_models_own_interpolation(source, tmp_path):
    torch.manual_seed(0)
    arguments = ModelArguments(model=save_untrained(source, tmp_path), image_size=64)
    model = build_model(arguments, LABELS).eval()
    model.classifier.load_state_dict(source.classifier.state_dict())
    pixels = torch.randn(2, 3, 64, 64)
    expected = source.eval()(pixels, interpolate_pos_encoding=True).logits
    assert expected.std() > 0.01
    torch.testing.assert_close(model(pixels).logits, expected, atol=1e-5, rtol=0)


def test_siglip2_naflex_is_a_siglip_on_squares(tmp_path):
    torch.manual_seed(0)
    vision = {k: v for k, v in SMALL.items() if k != "image_size"} | {"num_patches": 16}
    source = Siglip2ForImageClassification(Siglip2Config(vision_config=vision, num_labels=3))
    arguments = ModelArguments(model=save_untrained(source, tmp_path), image_size=32)
    model = build_model(arguments, LABELS).eval()
    model.classifier.load_state_dict(source.classifier.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    patches = pixels.unflatten(2, (4, 8)).unflatten(4, (4, 8)).permute(0, 2, 4, 3, 5, 1)
    expected = source.eval()(
        patches.flatten(1, 2).flatten(2),  # (B, 4 * 4, 8 * 8 * 3)
        pixel_attention_mask=torch.ones(2, 16, dtype=torch.long),
        spatial_shapes=torch.tensor([[4, 4], [4, 4]]),
    ).logits
    torch.testing.assert_close(model(pixels).logits, expected, atol=1e-5, rtol=0)


def test_what_a_config_sets_by_itself_changes_no_output(backbones, tmp_path):
    arguments = ModelArguments(model=backbones["dinov2"], image_size=32)
    model = build_model(arguments, LABELS).eval()
    model.save_pretrained(tmp_path)
    build_processor(arguments).save_pretrained(tmp_path)
    options = {
        "return_dict": False,
        "output_hidden_states": True,
        "problem_type": "multi_label_classification",
        "drop_path_rate": 0.5,
    }
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | options))
    again, _ = load_model(str(tmp_path))
    rebuilt = build_model(ModelArguments(model=str(tmp_path), image_size=32), LABELS).eval()
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    for other in (again, rebuilt):
        assert set(other(pixels)) == {"logits"}
        assert other.config.problem_type is None


def test_what_is_no_model_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match='no image classifier of the type "bert"'):
        build_model(ModelArguments(model=str(tmp_path)), LABELS)
    with pytest.raises(UserError, match='no folder "./nowhere"'):
        build_processor(ModelArguments(model="./nowhere"))


def test_a_frozen_backbone_trains_the_head_alone(backbones):
    arguments = ModelArguments(model=backbones["vit"], image_size=32, freeze_backbone=True)
    model = build_model(arguments, LABELS)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"classifier.weight", "classifier.bias"}
    groups = parameter_groups(model, 1e-3, 0.1, 1.0)
    assert sum(len(g["params"]) for g in groups) == 2


def test_a_frozen_backbone_keeps_its_batchnorm_statistics(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    folder = save_untrained(ResNetForImageClassification(config), tmp_path)
    model = build_model(ModelArguments(model=folder, image_size=32, freeze_backbone=True), LABELS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pixels = 3 + torch.randn(4, 3, 32, 32)
    logits = model.train()(pixels).logits
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(logits, model.eval()(pixels).logits)  # used, too
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"classifier.1.weight", "classifier.1.bias"}


def test_clip_is_frozen_and_decayed_as_a_vit(tmp_path):
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "vocab_size": 50}  # fmt: skip
    config = CLIPConfig(vision_config=SMALL, text_config=text)
    folder = save_untrained(CLIPForImageClassification(config), tmp_path)
    frozen = build_model(ModelArguments(model=folder, image_size=32, freeze_backbone=True), LABELS)
    trained = {name for name, p in frozen.named_parameters() if p.requires_grad}
    assert trained == {"classifier.weight", "classifier.bias"}
    model = build_model(ModelArguments(model=folder, image_size=32), LABELS)
    groups = parameter_groups(model, 1.0, 0.1, 0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_first = "embeddings" in name or "pre_layrnorm" in name
        in_layers = {f"layers.{i}": 0.25 * 2**i for i in range(2) if f"layers.{i}." in name}
        expected = 0.125 if is_first else next(iter(in_layers.values()), 1.0)
        assert rates[id(parameter)] == expected, name
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(model.vision_model.embeddings.position_embedding.weight)] == 0


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_layer_decay_halves_the_rate_from_layer_to_layer(backbones, kind):
    model = build_model(ModelArguments(model=backbones[kind], image_size=32), LABELS)
    rates = {id(p): g["lr"] for g in parameter_groups(model, 1.0, 0.1, 0.5) for p in g["params"]}
    assert len(rates) == len(list(model.parameters()))
    by_name = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert by_name["classifier.weight"] == 1.0
    for name, rate in by_name.items():
        if "embeddings" in name:
            assert rate == 0.125, name
    assert {rates[id(p)] for p in layers(model)[0].parameters()} == {0.25}
    assert {rates[id(p)] for p in layers(model)[1].parameters()} == {0.5}


def test_biases_norms_tokens_and_positions_are_not_decayed(backbones):
    model = build_model(ModelArguments(model=backbones["vit"], image_size=32), LABELS)
    decayed = {
        id(p)
        for g in parameter_groups(model, 1.0, 0.1, 1.0)
        if g["weight_decay"]
        for p in g["params"]
    }
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert "classifier.weight" in names
    assert not any(
        name.endswith(("bias", "cls_token", "position_embeddings")) or "layernorm" in name
        for name in names
    )


def test_drop_path_is_the_models_own(backbones):
    arguments = ModelArguments(model=backbones["dinov2"], image_size=32, drop_path_rate=0.4)
    model = build_model(arguments, LABELS).train()
    assert model.config.drop_path_rate == 0.4
    pixels = torch.randn(1, 3, 32, 32)
    assert not torch.equal(model(pixels).logits, model(pixels).logits)
    with pytest.raises(UserError, match=r'type "vit" has no drop_path_rate'):
        build_model(
            ModelArguments(model=backbones["vit"], image_size=32, drop_path_rate=0.1), LABELS
        )


def test_layer_decay_needs_one_list_of_layers():
    config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    with pytest.raises(UserError, match="ConvNextForImageClassification is not such a model"):
        parameter_groups(ConvNextForImageClassification(config), 1.0, 0.1, 0.5)


def test_a_real_backbone_keeps_every_weight(shared):
    folder = str(shared / "models/vit-small-patch14-224")
    model = build_model(ModelArguments(model=folder, image_size=98), LABELS)
    source = build_model(ModelArguments(model=folder, image_size=224), LABELS)
    differing = set()
    for name, weights in source.state_dict().items():
        ours = model.state_dict()[name]
        if name.startswith("classifier"):
            continue
        if ours.shape != weights.shape or not torch.equal(ours, weights):
            differing.add(name)
    assert differing == {"vit.embeddings.position_embeddings"}
