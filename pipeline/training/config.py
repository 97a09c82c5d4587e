"""Load a backbone's config and check that this pipeline can train such an image classifier."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig, PreTrainedConfig

from pipeline.errors import UserError
from pipeline.recipe import ModelArguments
from pipeline.runs import hub_commit, is_local

# A checkpoint's config may differ in these options, which change a classifier's output.
OUTPUT_OPTIONS = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "problem_type": None,
}
# Errors that transformers raises for an unusable config, checkpoint or image.
MODEL_ERRORS = (
    OSError, ImportError, ValueError, TypeError, LookupError, AttributeError, RuntimeError,
    StrictDataclassError,
)  # fmt: skip


def load_config(arguments: ModelArguments) -> PreTrainedConfig:
    """Load or build a backbone's config; UserError if this pipeline can't train such a model."""
    name = arguments.model or "model_config"
    with explained("build a classifier from", name):
        if arguments.model is None:
            config = AutoConfig.for_model(**arguments.model_config)
        else:
            check_exists(name, arguments.model_revision)
            folder, options = os.path.expanduser(name), {"revision": arguments.model_revision}
            settings, _ = PreTrainedConfig.get_config_dict(folder, **options)
            if settings.get("model_type") == "timm_wrapper":  # AutoConfig needs timm for it
                raise UserError(
                    f'"{name}" is a checkpoint of timm: choose one of transformers, such as '
                    "facebook/dinov2-small."
                )
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
        classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None)
        if classes is None:
            raise UserError(
                f'transformers has no image classifier of the type "{config.model_type}" '
                f'("{name}"): choose another backbone, such as facebook/dinov2-small.'
            )
        # Take the first: it has one head, while "with teacher" classes of DeiT and LeViT have two.
        model_class = classes[0] if isinstance(classes, tuple) else classes
        config.architectures = [model_class.__name__]
        if model_class.main_input_name != "pixel_values":
            raise UserError(f'"{name}" ({model_class.__name__}) does not take an image\'s pixels.')
    for part in config_parts(config):
        channels, patch = getattr(part, "num_channels", 3), getattr(part, "patch_size", None)
        if channels != 3:
            raise UserError(f'"{name}" takes images of {channels} channels, not 3: choose another.')
        for sides in (getattr(part, "image_size", None), patch):
            if isinstance(sides, list | tuple) and len(set(sides)) > 1:
                raise UserError(
                    f'"{name}" takes rectangles ({" x ".join(map(str, sides))}), but this pipeline '
                    "trains on square images: choose another backbone."
                )
        for size in training_sizes(arguments):
            if isinstance(patch, int) and size % patch:
                below = size // patch * patch
                raise UserError(
                    f"image_size is {size}, which patches of {patch} pixels don't divide evenly; "
                    f"the nearest sizes that work are {max(below, patch)} and {below + patch}."
                )
    if arguments.drop_path_rate and "drop_path_rate" not in type(config)().to_dict():
        raise UserError(
            f'A model of type "{config.model_type}" has no drop_path_rate in its config: remove '
            "it, or choose a backbone that supports it (DINOv2, BEiT, Swin, ConvNeXt)."
        )
    set_output_options(config)
    return config


def training_sizes(arguments: ModelArguments) -> list[int]:
    """Return the image sizes, in pixels, that a recipe trains at; the last is saved."""
    return list((arguments.image_size_schedule or {"0": arguments.image_size}).values())


def config_parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return the config, and its vision model's config if it has one (CLIP, SigLIP)."""
    return [config, *([config.vision_config] if hasattr(config, "vision_config") else [])]


def set_image_size(config: PreTrainedConfig, size: int) -> None:
    """Set the side of the input, in pixels, in the config's own format."""
    part = config_parts(config)[-1]
    is_pair = isinstance(getattr(part, "image_size", None), list | tuple)  # Hiera
    part.image_size = [size, size] if is_pair else size


def set_output_options(config: PreTrainedConfig) -> None:
    """Reset the options that change the output to those this pipeline expects."""
    for part in config_parts(config):
        for name, value in OUTPUT_OPTIONS.items():
            setattr(part, name, value)


def check_exists(name: str, revision: str | None) -> None:
    """Raise UserError unless a model is a local folder or exists on the Hub."""
    if not is_local(name):
        hub_commit("model", name, revision)


@contextmanager
def explained(action: str, name: str) -> Iterator[None]:
    """Convert an error from transformers into a UserError of one sentence."""
    try:
        yield
    except MODEL_ERRORS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # The lines after the first say how to install a package.
        reason = " ".join(" ".join(lines if isinstance(error, ImportError) else lines[:1]).split())
        name = name if name == "model_config" else f'"{name}"'
        raise UserError(f"Cannot {action} {name}: {reason}") from None
