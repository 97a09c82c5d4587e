"""Optimizer parameter groups with layer-wise learning-rate decay.

Clark et al. 2020, arXiv:2003.10555; for ViT, the recipe of BEiT, Bao et al. 2021, arXiv:2106.08254.
"""

import re

from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import UserError

NO_WEIGHT_DECAY = re.compile(
    r"(_token|_tokens|position_embeddings|position_embedding\.weight|position_bias_table)$"
)
BEFORE_LAYERS = re.compile(r"(^|\.)(embeddings|pre_layrnorm)\.")  # CLIP has the latter


def parameter_groups(
    model: PreTrainedModel, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict]:
    """Group the trainable parameters for an optimizer.

    Args:
        model: An image classifier.
        learning_rate: The head's learning rate.
        weight_decay: Not applied to biases, norms, tokens and position embeddings.
        layer_decay: A layer's learning rate divided by the next layer's; 1 is off.

    Returns:
        Groups with `params`, `lr` and `weight_decay`, the head's group first: the Trainer logs the
        learning rate of the first group.
    """
    names = [name for name, _ in model.named_parameters()]
    depths = _depths(model, names) if layer_decay != 1.0 else dict.fromkeys(names, 0)
    top = max(depths.values())
    groups: dict[tuple[int, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim <= 1 or NO_WEIGHT_DECAY.search(name)
        decay = 0.0 if exempt else weight_decay
        rate = learning_rate * layer_decay ** (top - depths[name])
        new = {"params": [], "lr": rate, "weight_decay": decay}
        groups.setdefault((depths[name], decay), new)["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: -group["lr"])


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the transformer's layers, first to last; UserError if they differ in shape."""
    config = getattr(model.config, "vision_config", model.config)
    count = getattr(config, "num_hidden_layers", None)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    shapes = {tuple(p.shape for p in layer.parameters()) for stack in stacks for layer in stack}
    if len(stacks) != 1 or len(shapes) != 1:
        raise UserError(
            f"layer_decay needs a model with one list of equal layers; {type(model).__name__} "
            "is not such a model: remove layer_decay."
        )
    return stacks[0]


def _depths(model: PreTrainedModel, names: list[str]) -> dict[str, int]:
    """Return each parameter's depth: 0 for the embeddings, 1 for the first layer, last the head."""
    stack = layers(model)
    prefix = next(name for name, module in model.named_modules() if module is stack) + "."
    depths = {}
    for name in names:
        if name.startswith(prefix):
            depths[name] = 1 + int(name.removeprefix(prefix).split(".")[0])
        else:
            depths[name] = 0 if BEFORE_LAYERS.search(name) else len(stack) + 1
    return depths
