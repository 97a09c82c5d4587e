"""A pretrained backbone with a new head, at the recipe's image size, and its image processor."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_backends import PilBackend
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import logging

from pipeline.data.transforms import input_size
from pipeline.errors import UserError
from pipeline.recipe import ModelArguments
from pipeline.runs import split_revision
from pipeline.training.backbone import (
    carry_over,
    check_weights,
    fixed_size_config,
    head_names,
    output_layers,
)
from pipeline.training.config import (
    check_exists,
    config_parts,
    explained,
    load_config,
    set_image_size,
    set_output_options,
    training_sizes,
)
from pipeline.training.processor import is_reproduced, plain_processor

# On a CPU, eager attention is faster up to about 100 patches and as fast at 196; beyond that, the
# attention matrices take a lot of memory.
EAGER_PATCHES = 256


def build_model(arguments: ModelArguments, labels: list[str]) -> PreTrainedModel:
    """Build the recipe's backbone with a new head, in float32.

    Args:
        arguments: The backbone and the image size; its position embeddings are interpolated to
            that size.
        labels: Class names.

    Returns:
        A model that maps float (B, 3, S, S) to logits (B, len(labels)).

    Raises:
        UserError: The backbone does not exist, it can't classify images of this size, or its
            checkpoint lacks some of its weights.
    """
    config = load_config(arguments)
    config.num_labels = len(labels)  # PVT stores this separately
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    if arguments.drop_path_rate:
        config.drop_path_rate = arguments.drop_path_rate
    with explained("build a classifier from", arguments.model or "model_config"):
        if arguments.model is None:
            set_image_size(config, arguments.image_size)
            model = AutoModelForImageClassification.from_config(config)
        else:
            model = _from_checkpoint(arguments, config)
        _set_attention(model, arguments.attention)
        for size in training_sizes(arguments):
            _check_output(model, size)
    if arguments.linear_probe_samples and len(output_layers(model)) != 1:
        raise UserError(
            f"linear_probe_samples needs a model with one last linear layer, which "
            f"{type(model).__name__} has not: set --linear_probe_samples=0."
        )
    if arguments.freeze_backbone:
        _freeze_backbone(model)
    return model


def build_processor(arguments: ModelArguments) -> PilBackend:
    """Build the image processor that is used in training and published.

    It converts colors and resamples like the checkpoint's (see `plain_processor`). The recipe's
    `resize` sets how it resizes and crops.

    Raises:
        UserError: The checkpoint or its processor can't be used.
    """
    if arguments.resize not in ("squash", "crop"):
        raise UserError(f'resize is "{arguments.resize}"; choose squash or crop.')
    crop, half = arguments.resize == "crop", [0.5, 0.5, 0.5]
    load_config(arguments)  # raises before the images are decoded
    if arguments.model is None:
        source = ViTImageProcessorPil(image_mean=half, image_std=half)
        return plain_processor(source, arguments.image_size, crop, "model_config")
    with explained("load the image processor of", arguments.model):
        source = AutoImageProcessor.from_pretrained(
            os.path.expanduser(arguments.model), revision=arguments.model_revision, backend="pil",
            trust_remote_code=False,
        )  # fmt: skip
        return plain_processor(source, arguments.image_size, crop, arguments.model)


def load_model(name: str) -> tuple[PreTrainedModel, PilBackend]:
    """Load a fine-tuned model in float32, and its image processor.

    Args:
        name: A local folder, or `id@revision` on the Hub.

    Raises:
        UserError: The model does not exist or is not a fine-tuned image classifier, or its image
            processor has steps that `preprocess` does not reproduce.
    """
    name, revision = split_revision(name)
    check_exists(name, revision)
    options = {"revision": revision, "trust_remote_code": False}
    with explained("load the model", name), _quiet():
        folder = os.path.expanduser(name)
        model, info = AutoModelForImageClassification.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **options
        )
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
    if info["missing_keys"]:
        raise UserError(
            f'"{name}" is not a fine-tuned image classifier: it has no weights for '
            f"{', '.join(sorted(info['missing_keys'])[:3])}."
        )
    if not is_reproduced(processor):
        raise UserError(
            f'The image processor of "{name}", {type(processor).__name__}, has steps that this '
            "pipeline does not reproduce: fine-tune the model here, which replaces its processor."
        )
    set_output_options(model.config)
    with explained("use the model", name):
        _set_attention(model, "auto")
        _check_output(model, input_size(processor))
    return model.eval(), processor


def size_options(model: PreTrainedModel, size: int) -> dict[str, bool]:
    """Return the arguments that a model needs for images of `size` pixels.

    Some models (ViT) interpolate their position embeddings only on request; others (DINOv2)
    always do.
    """
    can_interpolate = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    own_size = config_parts(model.config)[-1].to_dict().get("image_size")
    differs = own_size not in (size, [size, size])
    return {"interpolate_pos_encoding": True} if can_interpolate and differs else {}


def _from_checkpoint(arguments: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    with _quiet():
        source, info = AutoModelForImageClassification.from_pretrained(
            os.path.expanduser(arguments.model),
            config=config,
            revision=arguments.model_revision,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_weights(source, info)
    config = fixed_size_config(source.config)
    set_image_size(config, arguments.image_size)
    model = AutoModelForImageClassification.from_config(config)  # with a new head
    carry_over(source, model)
    return model


def _set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Set attention; `auto` is eager for few patches on a CPU, otherwise the model's default."""
    if implementation == "auto":
        config = config_parts(model.config)[-1]
        patch = getattr(config, "patch_size", None)
        few = isinstance(patch, int) and (config.image_size // patch) ** 2 <= EAGER_PATCHES
        if torch.accelerator.is_available() or not few:
            return
        implementation = "eager"
    model.set_attn_implementation(implementation)


def _check_output(model: PreTrainedModel, size: int) -> None:
    """Raise an error before training if the model gives no logits for images of this size."""
    mode = model.training
    with torch.no_grad():
        output = model.eval()(torch.zeros(1, 3, size, size), **size_options(model, size))
    model.train(mode)
    shape = getattr(getattr(output, "logits", None), "shape", None)
    if shape != (1, len(model.config.id2label)):
        raise UserError(
            f"{type(model).__name__} does not give one logit for each class: choose another model."
        )


def _freeze_backbone(model: PreTrainedModel) -> None:
    heads = head_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in heads)
    frozen = model.state_dict().keys() - heads
    for name, module in model.named_modules():
        if f"{name}.running_mean" in frozen:  # a BatchNorm
            module.register_forward_pre_hook(_use_running_statistics)


def _use_running_statistics(module: nn.Module, inputs: tuple) -> None:
    # At each step, since the Trainer sets the whole model to training mode.
    module.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' report of a missing head, which is expected."""
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()
