"""Check that all of a checkpoint's backbone is loaded, and adapt it to another image size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, SiglipConfig

from pipeline.errors import UserError

PATCH_EMBEDDING = "vision_model.embeddings.patch_embedding.weight"  # SigLIP's


def backbone_prefix(model: PreTrainedModel) -> str:
    """Return the prefix of the backbone's weight names; "" if it is not a module of its own."""
    # CLIP and SigLIP store their backbone under a name that is not `base_model_prefix`.
    names = (model.base_model_prefix, "vision_model")
    modules = dict(model.named_children())
    return next((f"{name}." for name in names if name in modules), "")


def head_names(model: PreTrainedModel) -> set[str]:
    """Return the names of the parameters and buffers outside the backbone."""
    names = list(model.state_dict())
    if prefix := backbone_prefix(model):
        return {name for name in names if not name.startswith(prefix)}
    last = names[-1].partition(".")[0]  # HGNetV2: the last module
    return {name for name in names if name.startswith(last + ".")}


def output_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """Return the linear layers of the head that give the logits; SwiftFormer averages two."""
    heads, classes = head_names(model), model.config.num_labels
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return [
        m for name, m in linear.items() if f"{name}.weight" in heads and m.out_features == classes
    ]


def check_weights(model: PreTrainedModel, info: dict) -> None:
    """Raise ValueError unless the checkpoint's backbone has the model's weights, and no others.

    Args:
        model: As `from_pretrained` made it.
        info: The loading info of `from_pretrained`.
    """
    prefix, backbone = backbone_prefix(model), model.state_dict().keys() - head_names(model)

    def module(name: str) -> str:
        return name.removeprefix(prefix).partition(".")[0]

    # Other modules (a pooler, a decoder) and the mask token belong to another task.
    modules = {module(name) for name in backbone}
    extra = {name for name in info["unexpected_keys"] if module(name) in modules}
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    for problem, names in {
        "lacks": backbone & info["missing_keys"],
        "has, in another shape than its config,": backbone & mismatched,
        "has, beyond its config,": {name for name in extra if not name.endswith("mask_token")},
    }.items():
        if names:
            raise ValueError(
                f"the checkpoint {problem} {len(names)} weights of the backbone, {min(names)} "
                "among them"
            )


def carry_over(source: PreTrainedModel, model: PreTrainedModel) -> None:
    """Load the source's weights into the model, in place, except the linear layers of its head.

    Args:
        source: A classifier with a checkpoint's weights.
        model: A new classifier, which may have another image size.

    Raises:
        UserError: A weight depends on the image size and can't be interpolated.
    """
    weights, heads = source.state_dict(), head_names(model)
    if source.config.model_type == "siglip2":  # linear (D, P*P*3) to convolution (D, 3, P, P)
        key, patch = PATCH_EMBEDDING, source.config.vision_config.patch_size
        weights[key] = weights[key].unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)
    buffers = dict(model.named_buffers())
    for name, new in model.state_dict().items():
        is_linear = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear)
        is_index = name in buffers and weights[name].shape != new.shape
        if is_index or (is_linear and name in heads):
            weights[name] = new
        elif weights[name].shape != new.shape:
            weights[name] = _interpolate(name, weights[name], new.shape)
    model.load_state_dict(weights, strict=True)


def fixed_size_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Convert a SigLIP 2 NaFlex config to SigLIP, which is equivalent for square images."""
    if config.model_type != "siglip2":
        return config
    vision = config.vision_config.to_dict() | {"model_type": "siglip_vision_model"}
    vision["image_size"] = int(vision.pop("num_patches") ** 0.5) * vision["patch_size"]
    labels = {"id2label": config.id2label, "label2id": config.label2id}
    return SiglipConfig(vision_config=vision, **labels)


def interpolate_positions(table: Tensor, patches: int) -> Tensor:
    """Interpolate position embeddings (1, T + G*G, D) to another grid, (1, T + patches, D).

    The T tokens before the grid ([CLS], distillation) keep their rows. The grid is resized
    bicubically, as the models themselves do for other input sizes.
    """
    tokens = _count_tokens(table.shape[1])
    cells = _resize_grid(table[0, tokens:], patches, "bicubic")
    return torch.cat([table[:, :tokens], cells[None]], dim=1)


def _interpolate(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    if name.endswith("position_embeddings"):  # (1, T + G*G, D)
        return interpolate_positions(value, shape[1] - _count_tokens(value.shape[1]))
    if name.endswith("position_embedding.weight"):  # CLIP and SigLIP: (T + G*G, D)
        return interpolate_positions(value[None], shape[0] - _count_tokens(value.shape[0]))[0]
    if name.endswith("relative_position_bias_table"):  # BEiT: the last 3 rows are for [CLS]
        return torch.cat([_resize_grid(value[:-3], shape[0] - 3, "bilinear"), value[-3:]])
    raise UserError(
        f"The weights {name} fit only the checkpoint's image size: set image_size to that size."
    )


def _count_tokens(rows: int) -> int:
    return rows - int(rows**0.5) ** 2  # 1 or 2, too few to reach the next square


def _resize_grid(cells: Tensor, count: int, mode: str) -> Tensor:
    """Resize a square grid of cells (G*G, D) to (count, D)."""
    grid, side = int(len(cells) ** 0.5), int(count**0.5)
    cells = cells.float().reshape(1, grid, grid, -1).permute(0, 3, 1, 2)  # (1, D, G, G)
    cells = F.interpolate(cells, (side, side), mode=mode, align_corners=False)
    return cells[0].flatten(1).T  # (count, D)
