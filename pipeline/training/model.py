"""A pretrained backbone with a new head, at the recipe's image size, and its image processor."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
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
from pipeline.runs import hub_commit, is_local, split_revision
from pipeline.training.backbone import carry_over, check_weights, fixed_size_config, head_names
from pipeline.training.processor import is_reproduced, plain_processor

# On a CPU, eager attention is faster up to about 100 patches and as fast at 196; beyond, the
# attention matrices take much memory.
EAGER_PATCHES = 256
# What a checkpoint's config may have otherwise, and would change what a classifier gives.
OUTPUT_OPTIONS = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "problem_type": None,
}
# What transformers raises for a config, a checkpoint or an image that a model can't take.
MODEL_ERRORS = (
    OSError, ImportError, ValueError, TypeError, LookupError, AttributeError, RuntimeError,
    StrictDataclassError,
)  # fmt: skip


def build_model(arguments: ModelArguments, labels: list[str]) -> PreTrainedModel:
    """Build the recipe's backbone with a new head, in float32.

    Args:
        arguments: The backbone, and the image size, to which its position embeddings are
            interpolated.
        labels: Names of the classes.

    Returns:
        A model from float (B, 3, S, S) to logits (B, len(labels)).

    Raises:
        UserError: The backbone does not exist, can't classify images of this size, or its
            checkpoint does not hold all of its weights.
    """
    config = _load_config(arguments)
    config.num_labels = len(labels)  # also a field of its own, in PVT
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    if arguments.drop_path_rate:
        config.drop_path_rate = arguments.drop_path_rate
    with _explained("build a classifier from", arguments.model or "model_config"):
        if arguments.model is None:
            _set_image_size(config, arguments.image_size)
            model = AutoModelForImageClassification.from_config(config)
        else:
            model = _from_checkpoint(arguments, config)
        _set_attention(model, arguments.attention)
        for size in training_sizes(arguments):
            _check_output(model, size)
    if arguments.freeze_backbone:
        _freeze_backbone(model)
    return model


def build_processor(arguments: ModelArguments) -> PilBackend:
    """Build the image processor to train with and to publish.

    It treats colors and resamples as the checkpoint's does, see `plain_processor`. The recipe's
    `resize` says how it resizes and crops.

    Raises:
        UserError: The checkpoint or its processor can't be used.
    """
    if arguments.resize not in ("squash", "crop"):
        raise UserError(f'resize is "{arguments.resize}"; choose squash or crop.')
    crop, half = arguments.resize == "crop", [0.5, 0.5, 0.5]
    _load_config(arguments)  # refused before the images are decoded
    if arguments.model is None:
        source = ViTImageProcessorPil(image_mean=half, image_std=half)
        return plain_processor(source, arguments.image_size, crop, "model_config")
    with _explained("load the image processor of", arguments.model):
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
        UserError: There is no such model, it is not a fine-tuned image classifier, or its image
            processor takes steps that `preprocess` does not reproduce.
    """
    name, revision = split_revision(name)
    _check_exists(name, revision)
    options = {"revision": revision, "trust_remote_code": False}
    with _explained("load the model", name), _quiet():
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
            f'The image processor of "{name}", {type(processor).__name__}, takes steps that this '
            "pipeline does not reproduce: fine-tune the model here, which gives it a plain one."
        )
    _set_options(model.config)
    with _explained("use the model", name):
        _set_attention(model, "auto")
        _check_output(model, input_size(processor))
    return model.eval(), processor


def training_sizes(arguments: ModelArguments) -> list[int]:
    """Return the sizes, in pixels, of the images that a recipe trains at; the last is saved."""
    return list((arguments.image_size_schedule or {0: arguments.image_size}).values())


def size_options(model: PreTrainedModel, size: int) -> dict[str, bool]:
    """Return the arguments with which a model takes images of `size` pixels.

    Some models (ViT) interpolate their position embeddings only when told to; others (DINOv2)
    always do.
    """
    can_interpolate = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    own_size = _parts(model.config)[-1].to_dict().get("image_size")
    differs = own_size not in (size, [size, size])
    return {"interpolate_pos_encoding": True} if can_interpolate and differs else {}


def _load_config(arguments: ModelArguments) -> PreTrainedConfig:
    """The backbone's config; UserError if it is of no model that this pipeline can train."""
    name = arguments.model or "model_config"
    with _explained("build a classifier from", name):
        if arguments.model is None:
            config = AutoConfig.for_model(**arguments.model_config)
        else:
            _check_exists(name, arguments.model_revision)
            config = AutoConfig.from_pretrained(
                os.path.expanduser(name), revision=arguments.model_revision, trust_remote_code=False
            )
        classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None)
        if classes is None:
            raise UserError(
                f'transformers has no image classifier of the type "{config.model_type}" ("{name}")'
                ": choose another backbone, such as facebook/dinov2-small."
            )
        # The first one: it has one head, where DeiT's and LeViT's "with teacher" have two.
        model_class = classes[0] if isinstance(classes, tuple) else classes
        config.architectures = [model_class.__name__]
        if model_class.main_input_name != "pixel_values":
            raise UserError(f'"{name}" ({model_class.__name__}) does not take an image\'s pixels.')
    for part in _parts(config):
        channels, patch = getattr(part, "num_channels", 3), getattr(part, "patch_size", None)
        if channels != 3:
            raise UserError(f'"{name}" takes images of {channels} channels; these have 3.')
        for sides in (getattr(part, "image_size", None), patch):
            if isinstance(sides, list | tuple) and len(set(sides)) > 1:
                raise UserError(
                    f'"{name}" takes rectangles ({" x ".join(map(str, sides))}), and this pipeline '
                    "trains on squares: choose another backbone."
                )
        for size in training_sizes(arguments):
            if isinstance(patch, int) and size % patch:
                below = size // patch * patch
                raise UserError(
                    f"image_size is {size}, which patches of {patch} pixels don't divide; the "
                    f"nearest that they do are {max(below, patch)} and {below + patch}."
                )
    if arguments.drop_path_rate and "drop_path_rate" not in type(config)().to_dict():
        raise UserError(
            f'A model of type "{config.model_type}" has no drop_path_rate in its config: leave it '
            "out, or choose a backbone that has it (DINOv2, BEiT, Swin, ConvNeXt)."
        )
    _set_options(config)
    return config


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
    _set_image_size(config, arguments.image_size)
    model = AutoModelForImageClassification.from_config(config)  # with a new head
    carry_over(source, model)
    return model


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The config, and that of the vision model in it (CLIP, SigLIP)."""
    return [config, *([config.vision_config] if hasattr(config, "vision_config") else [])]


def _set_image_size(config: PreTrainedConfig, size: int) -> None:
    part = _parts(config)[-1]
    is_pair = isinstance(getattr(part, "image_size", None), list | tuple)  # Hiera
    part.image_size = [size, size] if is_pair else size


def _set_options(config: PreTrainedConfig) -> None:
    for part in _parts(config):
        for name, value in OUTPUT_OPTIONS.items():
            setattr(part, name, value)


def _set_attention(model: PreTrainedModel, implementation: str) -> None:
    """`auto`: eager for few patches on a CPU; otherwise the model's own, sdpa where it has that."""
    if implementation == "auto":
        config = _parts(model.config)[-1]
        patch = getattr(config, "patch_size", None)
        few = isinstance(patch, int) and (config.image_size // patch) ** 2 <= EAGER_PATCHES
        if torch.accelerator.is_available() or not few:
            return
        implementation = "eager"
    model.set_attn_implementation(implementation)


def _check_output(model: PreTrainedModel, size: int) -> None:
    """Raise an error now, not in training, if the model gives no logits of such images."""
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
    # Again at each step, since the Trainer sets the whole model to training.
    module.eval()


def _check_exists(name: str, revision: str | None) -> None:
    if not is_local(name):
        hub_commit("model", name, revision)


@contextmanager
def _explained(action: str, name: str) -> Iterator[None]:
    """One sentence for what transformers raises."""
    try:
        yield
    except MODEL_ERRORS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # How to install a package comes in the next lines.
        reason = " ".join(" ".join(lines if isinstance(error, ImportError) else lines[:1]).split())
        name = name if name == "model_config" else f'"{name}"'
        raise UserError(f"Cannot {action} {name}: {reason}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of a missing head, which is expected."""
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()
