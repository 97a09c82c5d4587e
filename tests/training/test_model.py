import pytest
import torch
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTModel

from pipeline.errors import UserError
from pipeline.recipe import ModelArguments
from pipeline.training.model import (
    build_model,
    build_processor,
    interpolate_positions,
    load_model,
)
from pipeline.training.optimizer import layers, parameter_groups

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


def test_a_checkpoint_without_its_backbone_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)).save_pretrained(
        tmp_path
    )
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(next(k for k in weights if "layer" in k))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights of the backbone"):
        build_model(ModelArguments(model=str(tmp_path), image_size=224), LABELS)


def test_what_is_no_model_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="Cannot build a classifier from"):
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
    with pytest.raises(UserError, match="ConvNextForImageClassification is not"):
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
