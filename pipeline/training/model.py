"""A pretrained backbone with a new head, at the recipe's image size, and its image processor."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import logging

from pipeline.errors import UserError
from pipeline.recipe import ModelArguments
from pipeline.runs import hub_commit, is_local, split_revision

# On a CPU, eager attention is faster up to about 100 patches and as fast at 196; beyond, the
# attention matrices take much memory.
EAGER_PATCHES = 256


def build_model(arguments: ModelArguments, labels: list[str]) -> PreTrainedModel:
    """Build the recipe's backbone with a new head, in float32.

    Args:
        arguments: The backbone, and the image size, to which its position embeddings are
            interpolated.
        labels: Names of the classes.

    Returns:
        A model from float (B, 3, S, S) to logits (B, len(labels)).

    Raises:
        UserError: The backbone does not exist, can't classify images, or its patches don't divide
            the image size.
    """
    options = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    if arguments.drop_path_rate:
        options["drop_path_rate"] = arguments.drop_path_rate
    try:
        if arguments.model_config is not None:
            options = arguments.model_config | options | {"image_size": arguments.image_size}
            config = AutoConfig.for_model(options.pop("model_type", None), **options)
            _check_config(config, arguments)
            model = AutoModelForImageClassification.from_config(config)
        else:
            model = _from_checkpoint(arguments, options)
    except (ValueError, KeyError, OSError) as error:
        name = f'"{arguments.model}"' if arguments.model else "model_config"
        raise UserError(f"Cannot build a classifier from {name}: {_first_line(error)}") from None
    _set_attention(model, arguments.attention)
    if arguments.freeze_backbone:
        model.base_model.requires_grad_(False)
    return model


def build_processor(arguments: ModelArguments) -> ViTImageProcessorPil:
    """Build the image processor to train with and to publish.

    It has the checkpoint's mean, standard deviation, rescaling and resampling, and resizes the
    whole image to the recipe's size, without a crop.
    """
    size = {"height": arguments.image_size, "width": arguments.image_size}
    if arguments.model_config is not None:
        half = [0.5, 0.5, 0.5]
        return ViTImageProcessorPil(size=size, image_mean=half, image_std=half)
    _check_exists(arguments.model, arguments.model_revision)
    try:
        source = AutoImageProcessor.from_pretrained(
            os.path.expanduser(arguments.model), revision=arguments.model_revision, backend="pil"
        )
    except (ValueError, OSError) as error:
        raise UserError(
            f'Cannot load the image processor of "{arguments.model}": {_first_line(error)}'
        ) from None
    return ViTImageProcessorPil(
        size=size,
        resample=int(source.resample),
        image_mean=list(source.image_mean),
        image_std=list(source.image_std),
        rescale_factor=source.rescale_factor,
    )


def load_model(name: str) -> tuple[PreTrainedModel, ViTImageProcessorPil]:
    """Load a fine-tuned model in float32, and its image processor.

    Args:
        name: A local folder, or `id@revision` on the Hub.

    Raises:
        UserError: There is no such model, or it is not a fine-tuned image classifier.
    """
    name, revision = split_revision(name)
    _check_exists(name, revision)
    folder = os.path.expanduser(name)
    try:
        with _quiet():
            model, info = AutoModelForImageClassification.from_pretrained(
                folder, revision=revision, dtype=torch.float32, output_loading_info=True
            )
            processor = AutoImageProcessor.from_pretrained(folder, revision=revision, backend="pil")
    except (ValueError, OSError) as error:
        raise UserError(f'Cannot load the model "{name}": {_first_line(error)}') from None
    if info["missing_keys"]:
        raise UserError(
            f'"{name}" is not a fine-tuned image classifier: it has no weights for '
            f"{', '.join(sorted(info['missing_keys'])[:3])}."
        )
    _set_attention(model, "auto")
    return model.eval(), processor


def interpolate_positions(table: Tensor, patches: int) -> Tensor:
    """Interpolate position embeddings (1, T + G*G, D) to another grid, (1, T + patches, D).

    The T tokens before the grid ([CLS], distillation) keep their rows; the grid is resized
    bicubically, as the models themselves do for another input size.
    """
    grid = int((table.shape[1]) ** 0.5)
    tokens = table.shape[1] - grid**2  # 1 or 2, fewer than a step to the next square
    side = int(patches**0.5)
    cells = table[:, tokens:].float().reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    cells = F.interpolate(cells, (side, side), mode="bicubic", align_corners=False)  # (1, D, s, s)
    return torch.cat([table[:, :tokens], cells.flatten(2).transpose(1, 2)], dim=1)


def _from_checkpoint(arguments: ModelArguments, options: dict) -> PreTrainedModel:
    _check_exists(arguments.model, arguments.model_revision)
    folder = os.path.expanduser(arguments.model)
    _check_config(AutoConfig.from_pretrained(folder, revision=arguments.model_revision), arguments)
    with _quiet():
        source, info = AutoModelForImageClassification.from_pretrained(
            folder,
            revision=arguments.model_revision,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    backbone = source.base_model_prefix + "."
    missing = sorted(key for key in info["missing_keys"] if key.startswith(backbone))
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} weights of the backbone, {missing[0]} among them"
        )
    config = source.config
    config.image_size = arguments.image_size
    model = AutoModelForImageClassification.from_config(config)  # with a new head
    initial = model.state_dict()
    weights = {key: value for key, value in source.state_dict().items() if key.startswith(backbone)}
    for key, value in weights.items():
        if key.endswith("position_embeddings") and value.shape != initial[key].shape:
            patches = (config.image_size // config.patch_size) ** 2
            weights[key] = interpolate_positions(value, patches)
    head = {key: value for key, value in initial.items() if not key.startswith(backbone)}
    model.load_state_dict(weights | head, strict=True)
    return model


def _check_config(config, arguments: ModelArguments) -> None:
    patch, size = getattr(config, "patch_size", None), arguments.image_size
    if isinstance(patch, int) and size % patch:
        below = size // patch * patch
        raise UserError(
            f"image_size is {size}, which patches of {patch} pixels don't divide; the nearest "
            f"that they do are {below} and {below + patch}."
        )
    if arguments.drop_path_rate and "drop_path_rate" not in type(config)().to_dict():
        raise UserError(
            f'A model of type "{config.model_type}" has no drop_path_rate in its config: leave it '
            "out, or choose a backbone that has it (DINOv2, BEiT, Swin, ConvNeXt)."
        )


def _set_attention(model: PreTrainedModel, implementation: str) -> None:
    """`auto`: eager for few patches on a CPU; otherwise the model's own, sdpa where it has that."""
    if implementation == "auto":
        patch = getattr(model.config, "patch_size", None)
        few = isinstance(patch, int) and (model.config.image_size // patch) ** 2 <= EAGER_PATCHES
        if torch.accelerator.is_available() or not few:
            return
        implementation = "eager"
    model.set_attn_implementation(implementation)


def _check_exists(name: str, revision: str | None) -> None:
    if not is_local(name):
        hub_commit("model", name, revision)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


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
