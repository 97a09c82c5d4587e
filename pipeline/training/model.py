"""A pretrained backbone with a new head, at the recipe's resolution.

- Layer-wise learning-rate decay: Clark et al. 2020, arXiv:2003.10555; for ViT, BEiT's recipe,
  Bao et al. 2021, arXiv:2106.08254.
- Drop path (stochastic depth): Huang et al. 2016, arXiv:1603.09382.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
from pipeline.revision import hub_commit, is_local

EAGER_PATCHES = 256  # 49 and 64 are quicker so, 196 as quick; beyond, the maps take much memory


def build(arguments: ModelArguments, labels: list[str]) -> PreTrainedModel:
    """The recipe's backbone with a new head for `labels`, in float32.

    Maps float (B, 3, S, S) to logits (B, len(labels)). The position table is resized where
    the recipe's `image_size` is not the checkpoint's, and the config says so. UserError for
    a model that is not there, can't classify images, or whose patches don't divide the size.
    """
    names = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    try:
        if arguments.model_config is not None:
            options = dict(arguments.model_config) | names | {"image_size": arguments.image_size}
            config = AutoConfig.for_model(options.pop("model_type", None), **options)
            _check_patches(config)
            model = AutoModelForImageClassification.from_config(config)
        else:
            model = _from_checkpoint(arguments, names)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"Cannot build {_describe(arguments)}: {reason}") from None
    _set_attention(model, arguments.attention)
    if arguments.freeze_backbone:
        model.base_model.requires_grad_(False)
    if arguments.drop_path:
        add_drop_path(model, arguments.drop_path)
    return model


def build_processor(arguments: ModelArguments) -> ViTImageProcessorPil:
    """The image processor to train with and to publish: the checkpoint's own mean, std,
    rescaling and resampling, at the recipe's size, resized whole (no crop).
    """
    size = {"height": arguments.image_size, "width": arguments.image_size}
    if arguments.model_config is not None:
        half = [0.5, 0.5, 0.5]
        return ViTImageProcessorPil(size=size, image_mean=half, image_std=half)
    _find(arguments)
    try:
        source = AutoImageProcessor.from_pretrained(
            os.path.expanduser(arguments.model), revision=arguments.model_revision, backend="pil"
        )
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f'Cannot load the image processor of "{arguments.model}": {reason}'
        ) from None
    return ViTImageProcessorPil(
        size=size,
        resample=int(source.resample),
        image_mean=list(source.image_mean),
        image_std=list(source.image_std),
        rescale_factor=source.rescale_factor,
    )


def load(name: str, revision: str | None = None) -> tuple[PreTrainedModel, ViTImageProcessorPil]:
    """A fine-tuned model and its image processor, from a folder or the Hub, in float32."""
    _find(ModelArguments(model=name, model_revision=revision))
    folder = os.path.expanduser(name)
    try:
        with _quiet():
            model, info = AutoModelForImageClassification.from_pretrained(
                folder, revision=revision, dtype=torch.float32, output_loading_info=True
            )
            processor = AutoImageProcessor.from_pretrained(folder, revision=revision, backend="pil")
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f'Cannot load the model "{name}": {reason}') from None
    if info["missing_keys"]:
        raise UserError(
            f'"{name}" is no fine-tuned image classifier: it has no weights for '
            f"{', '.join(sorted(info['missing_keys'])[:3])}."
        )
    _set_attention(model, "auto")
    return model.eval(), processor


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer's layers, first to last, all of one shape; UserError for another model."""
    count = getattr(model.config, "num_hidden_layers", None)
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    shapes = {tuple(p.shape for p in layer.parameters()) for stack in found for layer in stack}
    if len(found) != 1 or len(shapes) != 1:
        raise UserError(
            f"drop_path and layer_decay need a model that is one list of like layers; "
            f"{type(model).__name__} is not."
        )
    return found[0]


def add_drop_path(model: PreTrainedModel, rate: float) -> None:
    """In training, pass a random share of the images around each layer.

    The share grows linearly with depth, up to `rate` at the last layer.
    """
    stack = layers(model)
    for depth, layer in enumerate(stack):
        layer.register_forward_hook(_drop_path_hook(rate * depth / max(len(stack) - 1, 1)))


def parameter_groups(
    model: PreTrainedModel, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict]:
    """Optimizer groups: the head at `learning_rate`, each layer below at `layer_decay` times it.

    Biases, norms, tokens and the position table are not decayed.
    """
    depths = _depths(model) if layer_decay != 1.0 else dict.fromkeys(_names(model), 0)
    top = max(depths.values())
    groups: dict[tuple[int, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or re.search(r"(_token|_tokens|position_embeddings)$", name)
        decay = 0.0 if plain else weight_decay
        group = groups.setdefault(
            (depths[name], decay),
            {
                "params": [],
                "lr": learning_rate * layer_decay ** (top - depths[name]),
                "weight_decay": decay,
            },
        )
        group["params"].append(parameter)
    # The head's first: the Trainer logs the rate of the first group.
    return sorted(groups.values(), key=lambda group: -group["lr"])


def resize_positions(table: Tensor, patches: int) -> Tensor:
    """A position table (1, T + G*G, D) for a grid of `patches` patches, (1, T + patches, D).

    The T tokens before the grid ([CLS], distillation) keep their rows; the grid is resized
    bicubically, as the models themselves do for another input size.
    """
    grid = int((table.shape[1]) ** 0.5)
    tokens = table.shape[1] - grid**2  # 1 or 2, fewer than a step to the next square
    side = int(patches**0.5)
    cells = table[:, tokens:].float().reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    cells = F.interpolate(cells, (side, side), mode="bicubic", align_corners=False)  # (1, D, s, s)
    return torch.cat([table[:, :tokens], cells.flatten(2).transpose(1, 2)], dim=1)


def _from_checkpoint(arguments: ModelArguments, names: dict) -> PreTrainedModel:
    _find(arguments)
    folder = os.path.expanduser(arguments.model)
    with _quiet():
        source, info = AutoModelForImageClassification.from_pretrained(
            folder,
            revision=arguments.model_revision,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **names,
        )
    body = source.base_model_prefix + "."
    missing = sorted(k for k in info["missing_keys"] if k.startswith(body))
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} weights of the backbone, {missing[0]} among them"
        )
    config = source.config
    if config.image_size != arguments.image_size:
        config.image_size = arguments.image_size
    _check_patches(config)
    model = AutoModelForImageClassification.from_config(config)  # with a new head
    wanted = model.state_dict()
    weights = {k: v for k, v in source.state_dict().items() if k.startswith(body)}
    for key, value in weights.items():
        if key.endswith("position_embeddings") and value.shape != wanted[key].shape:
            patches = (config.image_size // config.patch_size) ** 2
            weights[key] = resize_positions(value, patches)
    model.load_state_dict(
        weights | {k: v for k, v in wanted.items() if not k.startswith(body)}, strict=True
    )
    return model


def _check_patches(config) -> None:
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int) and config.image_size % patch:
        below = config.image_size // patch * patch
        raise UserError(
            f"image_size is {config.image_size}, which patches of {patch} pixels don't divide; "
            f"the nearest that they do are {below} and {below + patch}."
        )


def _set_attention(model: PreTrainedModel, asked: str) -> None:
    """`auto`: eager for few patches on a CPU, up to 1.7 times as fast there; else the model's own,
    which is sdpa where it has that.
    """
    if asked == "auto":
        patch = getattr(model.config, "patch_size", None)
        few = isinstance(patch, int) and (model.config.image_size // patch) ** 2 <= EAGER_PATCHES
        if torch.accelerator.is_available() or not few:
            return
        asked = "eager"
    model.set_attn_implementation(asked)


def _find(arguments: ModelArguments) -> None:
    if not is_local(arguments.model):
        hub_commit("model", arguments.model, arguments.model_revision)


def _describe(arguments: ModelArguments) -> str:
    return "model_config" if arguments.model_config else f'a classifier from "{arguments.model}"'


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _depths(model: PreTrainedModel) -> dict[str, int]:
    """Each parameter's depth: 0 for the embeddings, 1 for the first layer, last for the head."""
    body = model.base_model_prefix + "."
    stack = layers(model)
    prefix = next(name for name, module in model.named_modules() if module is stack) + "."
    depths = {}
    for name in _names(model):
        if name.startswith(prefix):
            depths[name] = 1 + int(name.removeprefix(prefix).split(".")[0])
        else:
            depths[name] = 0 if name.startswith(body + "embeddings") else len(stack) + 1
    return depths


def _drop_path_hook(rate: float):
    def hook(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        if not layer.training or rate == 0:
            return output
        before = inputs[0]  # (B, T, D)
        keep = torch.rand(len(before), 1, 1, device=before.device) >= rate
        return before + (output - before) * keep / (1 - rate)

    return hook


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of a missing head, which is what we want."""
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
