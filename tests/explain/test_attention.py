import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from pipeline.explain.attention import (
    COLORMAP,
    MAX_SIDE,
    class_relevance,
    compute_maps,
    normalized,
    overlay,
    rollout,
)
from samples import draw_image

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}

MODELS = {
    "vit": (ViTConfig, ViTForImageClassification, 1),
    "deit": (DeiTConfig, DeiTForImageClassification, 2),
    "dinov2": (Dinov2Config, Dinov2ForImageClassification, 1),
    "registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification, 5),
}


@pytest.fixture(params=MODELS)
def model_and_tokens(request):
    """A small model with peaked attention, and its number of tokens before the patches."""
    config, model_class, tokens = MODELS[request.param]
    torch.manual_seed(0)
    model = model_class(config(**SMALL, image_size=32, num_labels=5)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "query.weight", "key.weight")):
                parameter.mul_(40)
    return model, tokens


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def attention_by_hand(model, pixels) -> list[torch.Tensor]:
    """Compute each layer's attention (B, H, T, T) from its queries and keys."""
    outputs = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, output: outputs.append(output))
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "k_proj", "attention.query", "attention.key"))
    ]
    model(pixels)
    for hook in hooks:
        hook.remove()
    heads = model.config.num_attention_heads
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in outputs]  # (B, H, T, d)
    pairs = zip(split[::2], split[1::2], strict=True)
    return [(q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) for q, k in pairs]


def test_logits_are_the_same_with_attention_on_and_off(model_and_tokens, pixels):
    model, _ = model_and_tokens
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        plain = model(pixels).logits
    torch.testing.assert_close(compute_maps(model, pixels).logits, plain, atol=1e-4, rtol=0)
    assert model.config._attn_implementation == "sdpa"  # switched back


def test_maps_are_the_class_row_of_softmax_of_queries_and_keys(model_and_tokens, pixels):
    model, tokens = model_and_tokens
    maps = compute_maps(model, pixels)
    expected = attention_by_hand(model, pixels)
    assert len(expected) == 2
    assert maps.heads.shape == (3, 2, 2, 4, 4)
    for layer, attention in enumerate(expected):
        assert attention.shape[-1] == 16 + tokens
        torch.testing.assert_close(attention.sum(-1), torch.ones(3, 2, 16 + tokens))
        for head in range(2):
            row = attention[:, head, 0, tokens:].reshape(3, 4, 4)
            torch.testing.assert_close(maps.select("head", layer, head), row, atol=1e-5, rtol=0)
        mean = attention.mean(1)[:, 0, tokens:].reshape(3, 4, 4)
        torch.testing.assert_close(maps.select("mean", layer), mean, atol=1e-5, rtol=0)
    assert maps.heads.std() > 0.02  # uniform maps would hide a mix-up
    rows = rollout(expected)
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]))


def test_rollout_equals_a_hand_worked_two_layer_two_head_model():
    identity = torch.eye(3)
    turn = torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])
    swap = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]])
    first, second = torch.stack([identity, turn])[None], torch.stack([swap, swap])[None]
    # (I + (I + turn)/2)/2 = 3/4 I + 1/4 turn, then (I + swap)/2 times that:
    expected = torch.tensor([[0.5, 0.125, 0.375], [0, 0.75, 0.25], [0.5, 0.125, 0.375]])
    torch.testing.assert_close(rollout([first, second])[0], expected)


def test_relevance_equals_a_hand_worked_two_layer_two_head_model():
    first = torch.tensor([[[[0.5, 0.5], [0.2, 0.8]], [[0.9, 0.1], [0.4, 0.6]]]])
    gradient = torch.tensor([[[[2.0, -2], [1, 0]], [[0, 10], [-1, 5]]]])
    second = torch.tensor([[[[0.25, 0.75], [0.5, 0.5]], [[1.0, 0], [0, 1]]]])
    last = torch.tensor([[[[4.0, 4], [0, 0]], [[-1, -1], [-1, -1]]]])
    # Layer 1: the mean of [[1,0],[.2,0]] and [[0,1],[0,3]]; plus I: [[1.5,.5],[.1,2.5]].
    # Layer 2: the mean of [[1,3],[0,0]] and 0, times that, added to it.
    expected = torch.tensor([[2.4, 4.5], [0.1, 2.5]])
    torch.testing.assert_close(class_relevance([first, second], (gradient, last))[0], expected)


def test_relevance_is_for_the_requested_class(model_and_tokens, pixels):
    model, _ = model_and_tokens
    predicted = compute_maps(model, pixels)
    assert torch.equal(predicted.classes, predicted.logits.argmax(1))
    same = compute_maps(model, pixels, predicted.classes)
    torch.testing.assert_close(same.relevance, predicted.relevance)
    other = compute_maps(model, pixels, (predicted.classes + 1) % 5)
    assert not torch.allclose(other.relevance, predicted.relevance)
    torch.testing.assert_close(other.rollout, predicted.rollout)


def test_a_model_in_bfloat16_has_nearly_the_same_maps(model_and_tokens, pixels):
    model, _ = model_and_tokens
    exact = compute_maps(model, pixels)
    rounded = compute_maps(copy.deepcopy(model).bfloat16(), pixels.bfloat16(), exact.classes)
    for method in ("mean", "head", "rollout", "relevance"):
        flat = [maps.select(method).float().flatten() for maps in (rounded, exact)]
        assert torch.stack(flat).corrcoef()[0, 1] > 0.98


def test_one_image_in_a_batch_has_the_maps_it_has_alone(model_and_tokens, pixels):
    model, _ = model_and_tokens
    together, alone = compute_maps(model, pixels), compute_maps(model, pixels[1:2])
    for method in ("mean", "head", "rollout", "relevance"):
        torch.testing.assert_close(
            together.select(method)[1:2], alone.select(method), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    "model",
    [
        SwinForImageClassification(
            SwinConfig(
                image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2],
                window_size=4,
            )
        ),
        ConvNextForImageClassification(
            ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
        ),
        BeitForImageClassification(BeitConfig(**SMALL, image_size=32, use_mean_pooling=True)),
        Data2VecVisionForImageClassification(Data2VecVisionConfig(**SMALL, image_size=32)),
    ],
    ids=["swin", "convnext", "beit with mean pooling", "data2vec"],
)  # fmt: skip
def test_a_model_without_global_attention_is_refused(model, pixels):
    with pytest.raises(ValueError, match=r"ImageClassification has no global attention"):
        compute_maps(model, pixels)


def test_an_unknown_layer_head_method_or_class_is_an_error(model_and_tokens, pixels):
    model, _ = model_and_tokens
    maps = compute_maps(model, pixels, relevance=False)
    with pytest.raises(ValueError, match="no layer 2; choose from 0 to 1"):
        maps.select("mean", layer=2)
    with pytest.raises(ValueError, match="no head 7; choose from 0 to 1"):
        maps.select("head", head=7)
    with pytest.raises(ValueError, match='no map "relevance"'):
        maps.select("relevance")
    with pytest.raises(ValueError, match="no class 5; choose from 0 to 4"):
        compute_maps(model, pixels, 5)


@pytest.mark.parametrize("color", ["black", "gray", "white", "red"])
def test_an_overlay_is_darkest_where_attention_is_highest(color):
    values = np.zeros((4, 4))
    values[3, 0] = 1
    laid = overlay(Image.new("RGB", (32, 32), color), values)
    assert laid.size == (224, 224)  # a small image is enlarged
    gray = np.asarray(laid.convert("L"), dtype=float)
    row, column = np.unravel_index(gray.argmin(), gray.shape)
    assert row > 168
    assert column < 56
    assert gray.max() - gray.min() > 40


def test_an_image_keeps_its_colors_where_attention_is_lowest():
    values = np.zeros((4, 4))
    values[3, 0] = 1
    red = np.asarray(overlay(Image.new("RGB", (224, 224), (200, 40, 40)), values))[0, -1] / 255
    np.testing.assert_allclose(red, 0.35 + 0.65 * np.array([200, 40, 40]) / 255, atol=0.01)
    transparent = overlay(draw_image(0, (224, 224)), values, opacity=0)
    even = overlay(draw_image(0, (224, 224)), np.ones((4, 4)))
    assert np.array_equal(transparent, even)


def test_an_overlay_has_the_shape_of_its_image():
    values = np.eye(4)
    assert overlay(draw_image(0, (600, 300)), values).size == (600, 300)
    assert overlay(draw_image(0, (1, 5000)), values).size == (1, MAX_SIDE)


def test_the_color_map_darkens_evenly_in_grayscale():
    luminance = COLORMAP(np.linspace(0, 1, 50))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) < 0).all()


def test_a_uniform_map_is_normalized_to_zero():
    assert (normalized(np.full((3, 3), 0.1)) == 0).all()
